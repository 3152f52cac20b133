"""Pipeline stages against one process of ZeRO: the same losses, norms and weights, whatever the layout."""

from __future__ import annotations

import math
import os
import signal
import weakref
from typing import Any

import pytest
import torch
from distributed_runs import (
    FOLDER,
    bare_run,
    build_parts,
    once,
    run_ranks,
    run_training,
    tiny_config,
    train_steps,
)

STEPS = 3
LARGEST_NORM, BETA = 0.1, 0.9  # a quarter of the gradients' norm; AdamW's first
BF16 = {"bf16": {"enabled": True}}


def layout(stages: int, micro: int = 4, batch: int = 16, **changes: Any) -> dict[str, Any]:
    """A tiny run in so many stages; ZeRO 2 in one."""
    return tiny_config(
        train_batch_size=batch,
        train_micro_batch_size_per_gpu=micro,
        ijepa__pipeline={"stages": stages, "largest_bubble": 1},
        zero_optimization={"stage": 1 if stages > 1 else 2, "reduce_bucket_size": 10**6},
        **changes,
    )


def changing_targets(step: int) -> dict[str, int]:
    return {"target_tokens": 7 + step % 3}


def changing_contexts(step: int) -> dict[str, int]:
    return {"context_tokens": 18 - step, "target_tokens": 7 + step % 3}


def trained(raw: dict[str, Any], sizes: Any = changing_targets) -> dict[str, Any]:
    """In a rank: losses and gradient norms of some steps."""
    parts = build_parts(raw)
    told: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        told["losses"] += train_steps(parts, range(step, step + 1), sizes=sizes)
        told["norms"].append(float(parts.outcome.gradient_norm))
    return told


def all_trained(cases: list[tuple]) -> list[dict[str, Any]]:
    return [trained(*case) for case in cases]


@once
def of_one_process() -> dict[tuple, dict[str, Any]]:
    """By (images of a step, bf16, contexts of one length)."""
    cases = {
        (16, False, True): (layout(1),),
        (12, False, True): (layout(1, batch=12),),
        (16, True, True): (layout(1, **BF16),),
        (16, False, False): (layout(1), changing_contexts),
    }
    return dict(zip(cases, run_ranks(all_trained, 1, list(cases.values()))[0], strict=True))


def assert_equal(told: dict[str, Any], case: tuple, *, relative: float = 1e-6) -> None:
    expected = of_one_process()[case]
    torch.testing.assert_close(told["losses"], expected["losses"], rtol=relative, atol=0)
    torch.testing.assert_close(told["norms"], expected["norms"], rtol=20 * relative, atol=0)


def two_stages() -> dict[str, Any]:
    """In a rank of two: all that two stages must do, in one start."""
    contexts_of_many_lengths = layout(2, ijepa__masks={"sampler": "reference", "truncation_group": 16, "min_keep": 4})
    return {
        "accumulation 1": trained(layout(2, micro=16)),
        "accumulation 4": trained(layout(2)),
        "bf16": trained(layout(2, **BF16)),
        "contexts": trained(contexts_of_many_lengths, changing_contexts),
        "skips": [skips(layout(2), stage) for stage in (0, 1)] + [skips(layout(2, **BF16), 0)],
        "resumed": resumed(layout(2)),
        "rehearsed": rehearsed(layout(2)),
        "clipped": [clipped(layout(2, gradient_clipping=LARGEST_NORM, **changes)) for changes in ({}, BF16)],
        "kept": kept(layout(2)),
    }


def skips(raw: dict[str, Any], stage: int) -> bool:
    """Whether a step moves nothing, and the next one does, after a gradient on one stage was not finite."""
    parts = build_parts(raw)
    trainable = parts.trainable
    train_steps(parts, range(1))
    before = held(parts)
    if trainable.stage == stage:
        poisoned = next(p for p in trainable.engine.module.parameters() if p.requires_grad)
        handle = poisoned.register_hook(lambda gradient: gradient * math.nan)
    train_steps(parts, range(1, 2))
    applied, after = bool(parts.outcome.applied), held(parts)
    if trainable.stage == stage:
        handle.remove()
    train_steps(parts, range(2, 3))
    unmoved = all(torch.equal(before[name], after[name]) for name in before)
    moved = not torch.equal(after["master/0"], held(parts)["master/0"])
    return not applied and unmoved and bool(parts.outcome.applied) and moved


def held(parts: Any) -> dict[str, torch.Tensor]:
    state = parts.trainable.state()
    tensors = {f"{kind}/{i}": t.clone() for kind, slices in state.slices.items() for i, (_, t) in enumerate(slices)}
    return tensors | {f"steps/{group}": torch.stack(list(steps)) for group, steps in state.adam_steps.items()}


def resumed(raw: dict[str, Any]) -> bool:
    """Whether two steps, a checkpoint, and two more after reading it are four steps, to the last bit."""
    whole = build_parts(raw)
    train_steps(whole, range(2))
    checkpoint = whole.save(FOLDER / "stages_2", 2)
    losses = train_steps(whole, range(2, STEPS))
    again = build_parts(raw)
    assert again.load(checkpoint) == 2
    same = train_steps(again, range(2, STEPS)) == losses
    return same and all(torch.equal(t, held(again)[name]) for name, t in held(whole).items())


def rehearsed(raw: dict[str, Any]) -> list[float]:
    """Losses after every shape was compiled and tried, of which nothing may remain; what is compiled later raises."""
    from ijepa_ds.engine.warm_up import Shapes, compile_and_warm_up

    parts = build_parts(raw)
    parts.trainable.batches_at_once = 2  # as on a GPU
    # Made-up batches are [B, 3, H, W] already, the warm-up's zeros are as the loader's, whose strides count.
    as_made_up = parts.trainable.to_input
    parts.trainable.to_input = lambda images: as_made_up(
        images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images.to(memory_format=torch.channels_last)
    )
    shapes = Shapes(num_images=4, image_size=(32, 32), context_tokens=18, num_targets=4, target_tokens=[9, 8, 7])
    compile_and_warm_up(parts.trainable, shapes, parts.process, backend="eager")
    torch.compiler.set_stance("fail_on_recompile")
    losses = train_steps(parts, range(STEPS), sizes=changing_targets)
    torch.compiler.set_stance("default")
    return losses


def clipped(raw: dict[str, Any]) -> float:
    """The squared length of this stage's first moments after a step: of the clipped gradient, times 1 - beta."""
    parts = build_parts(raw)
    train_steps(parts, range(1))
    return sum(float(moment.square().sum()) for _, moment in parts.trainable.state().slices["exp_avg"])


def kept(raw: dict[str, Any]) -> tuple[int, int]:
    """How many of the parts that were handed over, and of the times that were noted, are still there after steps."""
    parts = build_parts(raw)
    trainable, alive = parts.trainable, weakref.WeakSet()
    hand_over = trainable._hand_over

    def noted(*arguments: Any) -> Any:
        inputs, labels = part = hand_over(*arguments)
        alive.update((inputs[0], labels[2]))
        return part

    trainable._hand_over = noted
    train_steps(parts, range(2))
    timers = trainable.engine.timers.get_timers().values()
    return len(alive), sum(len(timer.event_timers) for timer in timers)


@once
def of_two_stages() -> list[dict[str, Any]]:
    return run_ranks(two_stages, 2)


def test_two_stages_learn_what_one_process_learns() -> None:
    for told in of_two_stages():
        assert_equal(told["accumulation 1"], (16, False, True))
        assert_equal(told["accumulation 4"], (16, False, True))
        assert_equal(told["bf16"], (16, True, True), relative=1e-3)
        assert_equal(told["contexts"], (16, False, False))


def test_a_rehearsal_of_every_shape_leaves_nothing_behind() -> None:
    for told in of_two_stages():
        torch.testing.assert_close(told["rehearsed"], told["accumulation 4"]["losses"], rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_finite_on_one_stage_skips_the_step_on_all() -> None:
    assert [told["skips"] for told in of_two_stages()] == [[True] * 3] * 2


def test_gradients_are_clipped_by_the_norm_over_all_stages() -> None:
    for stages in zip(*(told["clipped"] for told in of_two_stages()), strict=True):
        assert math.sqrt(sum(stages)) == pytest.approx((1 - BETA) * LARGEST_NORM, rel=1e-4)


def test_nothing_of_a_step_is_kept_until_the_next() -> None:
    assert [told["kept"] for told in of_two_stages()] == [(0, 0)] * 2


def test_the_same_layout_resumes_to_the_last_bit() -> None:
    assert all(told["resumed"] for told in of_two_stages())


# ------------------------------------------------------------------------------------------- one layout after another


# 2 stages -> 3 processes of ZeRO 2 -> 2 stages x 2 -> 3 stages: (stages, processes, sizes, checkpoint read, written).
CHAIN = [
    (1, 3, {"batch": 12}, "stages_2", "zero_3"),
    (2, 4, {}, "zero_3", "stages_2x2"),
    (3, 3, {"batch": 12, "micro": 3}, "stages_2x2", "stages_3"),
]
FIRST = 2  # the step of the first checkpoint


def went_on(raw: dict[str, Any], before: str, after: str, step: int) -> dict[str, Any]:
    """In a rank: training as it is by itself (stages alone), then a step from another layout's checkpoint."""
    told = trained(raw) if raw["ijepa"]["pipeline"]["stages"] > 1 else {}
    parts = build_parts(raw)
    return {**told, "went on": one_step_from(parts, before, step), "saved": parts.save(FOLDER / after, step + 1)}


def one_step_from(parts: Any, before: str, step: int) -> list[float]:
    parts.load(FOLDER / before / f"step_{step:09d}")
    return train_steps(parts, range(step, step + 1))


def went_on_alone() -> list[list[float]]:
    """In one process: the steps that the chain's layouts take."""
    steps = enumerate(CHAIN, start=FIRST)
    return [
        one_step_from(build_parts(layout(1, batch=sizes.get("batch", 16))), before, step)
        for step, (_, _, sizes, before, _) in steps
    ]


def test_any_layout_goes_on_from_any_other() -> None:
    of_two_stages()  # leaves its checkpoint
    losses = []
    for step, (stages, ranks, sizes, before, after) in enumerate(CHAIN, start=FIRST):
        results = run_ranks(went_on, ranks, layout(stages, **sizes), before, after, step)
        for told in results if stages > 1 else []:
            assert_equal(told, (sizes.get("batch", 16), False, True))
        losses.append([told["went on"] for told in results])
    for of_ranks, alone in zip(losses, run_ranks(went_on_alone, 1)[0], strict=True):
        for of_rank in of_ranks:
            torch.testing.assert_close(of_rank, alone, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------------- a real run


def stop_after_the_second_step() -> None:
    """In a rank: SIGTERM to rank 1 alone, which all hear of."""
    from ijepa_ds.engine.stages import Stages

    step = Stages.step

    def stopped(self: Any, *arguments: Any) -> Any:
        outcome = step(self, *arguments)
        if self.process.rank == 1 and (steps := getattr(self, "steps", 0) + 1) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.steps = steps if self.process.rank == 1 else 0
        return outcome

    Stages.step = stopped  # type: ignore[method-assign]


def test_a_stopped_run_goes_on_and_is_that_of_one_process() -> None:
    raw = layout(2, ijepa__run__name="two_stages")
    stopped = run_training(raw, 2, prepare=stop_after_the_second_step)
    assert stopped.exit_codes == [0, 0], stopped.output
    assert stopped.checkpoints == ["step_000000003"]  # a step later, as several processes hear of it
    ended = run_training(raw, 2)
    assert ended.exit_codes == [0, 0], ended.output
    assert "2 pipeline stages x 1" in ended.output and "going on from step 3" in ended.output
    torch.testing.assert_close(ended.losses, bare_run(1).losses, rtol=1e-6, atol=0)


def in_five_stages(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trained(raw) for raw in cases]


@pytest.mark.long
def test_every_layer_may_be_a_stage_of_its_own() -> None:
    """The norm alone has no weight that decays, the predictor alone none of the average."""
    checkpointed = {"ijepa__model__activation_checkpointing": True}
    changes = [{}, BF16, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {**BF16, **checkpointed}]
    told, alone = (
        run_ranks(in_five_stages, stages, [layout(stages, micro=5, batch=15, **change) for change in changes])
        for stages in (5, 1)
    )
    for of_rank in told:
        for case, expected in zip(of_rank, alone[0], strict=True):
            torch.testing.assert_close(case["losses"], expected["losses"], rtol=1e-6, atol=0)
            torch.testing.assert_close(case["norms"], expected["norms"], rtol=1e-5, atol=0)


@pytest.mark.long
def test_the_released_codes_masks_come_in_contexts_of_many_lengths() -> None:
    changes = {
        "ijepa__masks": {"sampler": "reference", "truncation_group": 4, "min_keep": 4},
        "ijepa__run__stop_after_steps": 3,
    }
    runs = [
        run_training(layout(stages, ijepa__run__name=f"reference_{stages}", **changes), stages) for stages in (1, 2)
    ]
    assert len(runs[0].losses) == 3
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-6, atol=0)
