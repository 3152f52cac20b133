"""Memory of a GPU: the shares of the state by hand, and what changes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planning import make_plan, write_tiny

from ijepa_ds.plan.memory import HEADROOM, memory_of_stages

FP32 = "bf16.enabled=false"


def test_vit_h_by_hand() -> None:
    """W = 652.7 million weights, E = 630.4 of them the encoder's: 18 W + 6 E bytes on one GPU."""
    plan = make_plan("vith14")
    work, memory = plan.work, plan.memory()
    weights, encoder = work.parameters, work.encoder_parameters
    assert (weights, encoder) == (652_713_984, 630_434_560)
    assert memory.state == 18 * weights + 6 * encoder
    assert memory.buckets == 3 * 2 * 50_000_000
    of_block = (
        72 * 32 * (16 * 1280 + 4 * 5120)
    )  # the encoder's blocks, norms' statistics and sums of attention left out
    of_predictor = 4 * (72 + 56) * 12 * (16 * 384 + 4 * 4 * 384)
    assert memory.activations == pytest.approx(128 * (of_block + of_predictor), rel=0.02)
    assert memory.total / 1e9 == pytest.approx(39.9, abs=0.05)
    assert memory.total == sum(memory.parts().values())


@pytest.mark.parametrize(
    ("overrides", "gpus", "state"),
    [  # bytes a weight of the trained networks and of the encoder, on two GPUs: as DeepSpeed's optimizers keep them
        ((), 2, (2 + 6 + 2, 2 + 2)),
        (("zero_optimization.stage=1",), 2, (2 + 6 + 6, 2 + 2)),  # whole gradients, twice
        (("zero_optimization.stage=0",), 2, (2 + 12 + 6, 2 + 4)),
        ((FP32,), 2, (4 + 6 + 2, 4 + 2)),
        ((FP32, "zero_optimization.stage=1"), 2, (4 + 6 + 4, 4 + 2)),
        ((FP32, "zero_optimization.stage=0"), 2, (4 + 8 + 4, 4 + 4)),  # the weights are the masters
    ],
)
def test_the_state_by_stage_and_precision(tmp_path: Path, overrides, gpus: int, state: tuple[int, int]) -> None:
    plan = make_plan(write_tiny(tmp_path), *overrides, gpus=gpus)
    trained, encoder = state
    assert plan.memory().state == trained * plan.work.parameters + encoder * plan.work.encoder_parameters


def test_two_contexts_keep_twice_the_activations_and_a_projection_has_weights(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path)
    one, two = make_plan(tiny), make_plan(tiny, "ijepa.objective.contexts=2")
    assert two.memory().activations == 2 * one.memory().activations
    assert one.work.flops.context_encoder * 2 == two.work.flops.context_encoder
    width = one.work.shapes.encoder.width
    more = make_plan(tiny, "ijepa.objective.vicreg=1", "ijepa.objective.vicreg_group=2").work.parameters
    assert more - one.work.parameters == (width + 1) * 256 + (256 + 1) * 256


def test_stages_share_weights_but_not_the_target_encoder(tmp_path: Path) -> None:
    overrides = ("zero_optimization.stage=1", "ijepa.pipeline.stages=2", "ijepa.pipeline.largest_bubble=1")
    plan = make_plan(write_tiny(tmp_path), *overrides, gpus=4)
    memory, work = plan.memory(), plan.work
    assert memory.target == 2 * work.encoder_parameters
    stage = memory.weights / 2
    assert 0.5 * work.parameters <= stage < work.parameters
    assert memory.gradients == 4 * stage  # whole in fp32, on each of the stage's GPUs
    assert memory.optimizer == 12 * stage / 2


def test_the_first_stage_holds_micro_batches_that_the_others_work_on() -> None:
    staged = ("zero_optimization.stage=1", "ijepa.pipeline.stages=4", "train_micro_batch_size_per_gpu=32")
    plan = make_plan("vith14", *staged, gpus=16)
    first, *_, last = memory_of_stages(plan.work, 16)
    alone = replace(plan.work, global_batch=32 * 4)  # one micro-batch a step: nothing is in flight
    first_alone, *_, last_alone = memory_of_stages(alone, 16)
    assert first.activations == 4 * first_alone.activations
    assert last.activations == last_alone.activations
    assert first.weights > 0 and plan.memory().total == max(m.total for m in memory_of_stages(plan.work, 16))


def test_a_micro_batch_and_checkpointing_change_activations_alone(tmp_path: Path) -> None:
    plan = make_plan(write_tiny(tmp_path))
    whole, half, checkpointed = plan.memory(), plan.memory(micro_batch=2), plan.memory(checkpointed=True)
    assert half.activations == whole.activations / 2
    assert checkpointed.activations < whole.activations
    assert half.state == checkpointed.state == whole.state


def test_what_fits_is_what_is_predicted_to_fit() -> None:
    plan = make_plan("vith14", gpu="a100-40", gpus=1)
    assert not plan.fits()
    largest = plan.largest_micro_batch()
    assert largest == 64 and 2048 % largest == 0
    assert plan.memory(micro_batch=largest).total <= HEADROOM * 40e9 < plan.memory(micro_batch=2 * largest).total
    assert plan.fits(checkpointed=True)
