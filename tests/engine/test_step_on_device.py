"""What the optimizer step does on the device in DeepSpeed's place: it skips, clips and gathers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed_runs import (
    build_parts,
    once,
    run_ranks,
    tiny_config,
    train_steps,
)

BF16 = {"bf16": {"enabled": True}}
DEEPSPEEDS_OWN_SKIP = {
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "zero_optimization__compute_grad_norm": True,
}


def state_of(parts: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the state, and of the weights that compute."""
    state = parts.trainable.state()
    tensors = {f"{kind}/{i}": t.clone() for kind, slices in state.slices.items() for i, (_, t) in enumerate(slices)}
    tensors |= {f"step/{group}": torch.stack(list(steps)) for group, steps in state.adam_steps.items()}
    parts.trainable.wait_for_weights()
    weights = dict(parts.trainable.module.named_parameters())
    return tensors | {f"weight/{name}": weight.detach().clone() for name, weight in weights.items()}


def step_with_nan(parts: Any, step: int) -> None:
    poisoned = parts.trainable.module.predictor.predictor_proj.bias
    handle = poisoned.register_hook(lambda gradient: gradient * math.nan)
    train_steps(parts, range(step, step + 1))
    handle.remove()


def states_around_a_nan(changes: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """In a rank: after two steps, after one more whose gradient is NaN, after a last one."""
    parts = build_parts(tiny_config(**changes))
    train_steps(parts, range(2))
    states, norms = [state_of(parts)], [float(parts.outcome.gradient_norm)]
    step_with_nan(parts, 2)
    states.append(state_of(parts))
    train_steps(parts, range(3, 4))
    return [*states, state_of(parts), {"norm": torch.tensor(norms)}]


def skips_compared() -> tuple[list, list]:
    return states_around_a_nan(BF16), states_around_a_nan(DEEPSPEEDS_OWN_SKIP)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skip_on_the_device_is_deepspeeds_own_to_the_last_bit(world_size: int) -> None:
    for ours, deepspeeds in run_ranks(skips_compared, world_size):
        for here, there in zip(ours[:-1], deepspeeds[:-1], strict=True):
            assert here.keys() == there.keys()
            assert [name for name in here if not torch.equal(here[name], there[name])] == []
        assert [name for name in ours[0] if not torch.equal(ours[0][name], ours[1][name])] == []  # nothing moved
        assert not torch.equal(ours[1]["master/0"], ours[2]["master/0"])
        torch.testing.assert_close(ours[-1]["norm"], deepspeeds[-1]["norm"], rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------------------- clipping


def clipped(largest: float, changes: dict[str, Any]) -> tuple[float, float]:
    """In a rank: the norm of the first step's gradient as told, and as AdamW's first moment (0.1 of it) shows it."""
    parts = build_parts(tiny_config(gradient_clipping=largest, **changes))
    train_steps(parts, range(1))
    squares = torch.stack([moment.square().sum() for _, moment in parts.trainable.state().slices["exp_avg"]]).sum()
    if parts.trainable.shards[0].process_group is not None:
        torch.distributed.all_reduce(squares)
    return float(parts.outcome.gradient_norm), float(squares.sqrt()) / 0.1


CLIPPED = [
    BF16,
    {"bf16": {}},
    {"bf16": {}, "zero_optimization": {"stage": 0}},
    {**BF16, "zero_optimization": {"stage": 1}},
]


def clipped_all() -> list[list[tuple[float, float]]]:
    return [[clipped(largest, changes) for largest in (1e6, 0.01)] for changes in CLIPPED]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_clipped_to_the_largest_norm(world_size: int) -> None:
    for of_rank in run_ranks(clipped_all, world_size):
        for (norm, unclipped), (norm_again, small) in of_rank:
            assert norm > 0.1 and norm_again == pytest.approx(norm, rel=1e-4)
            assert unclipped == pytest.approx(norm, rel=1e-3) and small == pytest.approx(0.01, rel=1e-3)


# ------------------------------------------------------------------------------------------------ gathers, two ranks


def order_of_a_step() -> dict[str, Any]:
    """In a rank: what is gathered and computed in three steps, in order, and the weights at each forward's start."""
    import torch.distributed as dist

    parts = build_parts(tiny_config(**BF16, train_micro_batch_size_per_gpu=8))
    trainable, events, equal = parts.trainable, [], []
    names = {flat.weights.data_ptr(): "average" for flat in trainable.average._flats}
    names |= {shard.weights.data_ptr(): "weights" for shard in trainable.shards}
    gather = dist.all_gather_into_tensor

    def recorded(output: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        events.append(f"gather {names[output.data_ptr()]}")
        return gather(output, *arguments, **keywords)

    dist.all_gather_into_tensor = recorded
    trainable.target_encoder.encoder.patch_embed.register_forward_pre_hook(lambda *_: events.append("target"))

    def context(module: torch.nn.Module, arguments: Any) -> None:
        events.append("context")
        for shard in trainable.shards:
            other = shard.weights.float().clone()
            dist.broadcast(other, src=0)
            own = shard.master.to(shard.weights.dtype)
            equal.append(torch.equal(other, shard.weights.float()))
            equal.append(torch.equal(own, shard.weights[shard.first : shard.first + shard.length]))

    trainable.module.context_encoder.register_forward_pre_hook(context)
    train_steps(parts, range(3))
    return {"events": events, "equal": equal}


@once
def recorded_order() -> list[dict[str, Any]]:
    return run_ranks(order_of_a_step, 2)


def test_the_average_is_gathered_first_and_the_weights_behind_the_target_encoder() -> None:
    gathers = ["gather average"] * 2 + ["gather weights"] * 4  # two groups of the encoder, four in all
    for rank in recorded_order():
        assert rank["events"] == ["target", "context", *gathers] * 3


def test_all_ranks_compute_with_the_same_weights() -> None:
    for rank in recorded_order():
        assert len(rank["equal"]) == 3 * 4 * 2 and all(rank["equal"])


# ---------------------------------------------------------------------------------------- the target encoder at once


def losses_at_once() -> list[tuple[list[float], int]]:
    """In a rank: the losses of three steps of four micro-batches, and the target encoder's forward passes of a step."""
    results = []
    for at_once in (1, 3, 4):
        parts = build_parts(tiny_config(bf16={}, train_micro_batch_size_per_gpu=4))
        parts.trainable.batches_at_once = at_once
        calls: list[int] = []
        parts.trainable.target_encoder.encoder.patch_embed.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        results.append((train_steps(parts, range(3)), len(calls) // 3))
    return results


def test_the_target_encoder_takes_several_micro_batches_at_once() -> None:
    ((plain, calls), *others) = run_ranks(losses_at_once, 1)[0]
    assert calls == 4
    assert [calls for _, calls in others] == [2, 1]
    for losses, _ in others:
        assert losses == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("device", "micro_batch", "at_once"),
    [("cuda", 16, 1), ("cuda", 8, 2), ("cuda", 2, 8), ("cuda", 1, 8), ("cpu", 2, 1)],
)
def test_it_takes_as_many_as_need_less_memory_than_a_backward_pass(device: str, micro_batch: int, at_once: int) -> None:
    from ijepa_ds.config import parse_config
    from ijepa_ds.distributed import Process
    from ijepa_ds.train import micro_batches_at_once

    # 32 blocks of 18 of 64 patches: as much as one block of all patches of nine micro-batches.
    config = parse_config(tiny_config(ijepa__model__depth=32, train_micro_batch_size_per_gpu=micro_batch))
    assert micro_batches_at_once(config, Process(0, 1, torch.device(device))) == at_once
