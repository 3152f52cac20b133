"""Losses between two log lines: what is read of them, and which stand out."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_ds.distributed import Process
from ijepa_ds.engine.trainable import Outcome, norms_by_layer
from ijepa_ds.run.loss_guard import SPIKE_LEAST, SPIKE_WINDOW, Spikes, in_words
from ijepa_ds.run.losses import LossWindow, StepLoss


def outcome(*losses: float, applied: bool = True) -> Outcome:
    return Outcome(torch.tensor(losses), torch.tensor(applied), None)


def window() -> LossWindow:
    return LossWindow(Process(0, 1, torch.device("cpu")))


def test_the_mean_is_of_the_finite_losses_and_of_those_since_the_last_reading() -> None:
    losses = window()
    losses.add(1, outcome(1.0, 3.0))
    losses.add(2, outcome(math.nan, 8.0, applied=False))
    read = losses.read()
    assert read.mean == 4.0 and read.skipped == 1 and read.in_a_row == 1
    assert read.steps == [StepLoss(1, 2.0, True), StepLoss(2, 8.0, False, [(0, 0)])]
    losses.add(3, outcome(5.0, 5.0))
    assert losses.read().mean == 5.0


def test_steps_in_a_row_are_counted_across_readings_and_by_gradient_alone() -> None:
    losses, counts = window(), []
    for step, (loss, applied) in enumerate([(1.0, True), (1.0, False), (math.inf, False), (2.0, True)], 1):
        losses.add(step, outcome(loss, applied=applied))
        counts.append(losses.read().in_a_row)
    assert counts == [0, 1, 2, 0]


def test_a_window_without_a_finite_loss_has_no_mean() -> None:
    losses = window()
    losses.add(1, outcome(math.nan, applied=False))
    assert math.isnan(losses.read().mean)


def steady(count: int, first: int = 1) -> list[StepLoss]:
    return [StepLoss(step, 0.3 + 0.001 * (step % 3), True) for step in range(first, first + count)]


def test_a_spike_is_told_once_enough_steps_are_known() -> None:
    assert Spikes(8).look([*steady(SPIKE_LEAST - 1), StepLoss(99, 1.0, True)]) is None
    spikes = Spikes(8)
    assert spikes.look(steady(SPIKE_WINDOW)) is None
    told = spikes.look([StepLoss(201, 0.5, True), StepLoss(202, math.nan, False)])
    assert told is not None and told.startswith("the loss of step 201 is 0.5000, ")
    assert spikes.look(steady(50, 203)) is None


@pytest.mark.parametrize("deviations", [0.0, 1e6])
def test_spikes_can_be_ignored(deviations: float) -> None:
    assert Spikes(deviations).look([*steady(SPIKE_WINDOW), StepLoss(201, 0.9, True)]) is None


def test_equal_losses_are_no_spike() -> None:
    assert Spikes(8).look([StepLoss(step, 0.5, True) for step in range(SPIKE_WINDOW)]) is None


def test_a_step_that_was_not_finite_in_words() -> None:
    place = {"rank": 1, "micro_batch": 0, "samples": list(range(20))}
    words = in_words(StepLoss(7, 0.1, False, [(0, 1)]), [place])
    assert words == "7 (the loss of samples 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, on rank 1; nothing moved)"
    assert in_words(StepLoss(7, 0.1, False), []) == "7 (its gradient; nothing moved)"
    assert in_words(StepLoss(7, math.nan, True, [(0, 0)]), []) == "7 (its loss; applied all the same)"


def test_norms_are_by_block_or_by_part() -> None:
    ones = torch.ones(4)
    names = [
        "predictor.predictor_blocks.1.mlp.fc1.weight",
        "predictor.predictor_blocks.1.norm1.bias",
        "context_encoder.norm.weight",
    ]
    norms = norms_by_layer(dict.fromkeys(names, ones))
    assert norms == {"predictor.predictor_blocks.1": pytest.approx(math.sqrt(8)), "context_encoder.norm": 2.0}
