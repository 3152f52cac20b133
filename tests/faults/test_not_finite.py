"""Losses that are not finite: on one rank or all, in a pipeline too; none is applied, and the run says which."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
from distributed_runs import TrainingRun, run_training, tiny_config
from fault_rows import Row

MICRO_BATCHES = 2
FIRST = 3  # the step from which on a rank's losses are not finite


def spoil(ranks: set[int]) -> None:
    """Make all losses from step :data:`FIRST` on infinite on some ranks."""
    from ijepa_ds.engine import stages
    from ijepa_ds.method import ijepa

    whole, calls = ijepa.prediction_loss, []

    def loss(predictions, targets):
        calls.append(1)
        bad = len(calls) > MICRO_BATCHES * (FIRST - 1) and int(os.environ["RANK"]) in ranks
        return whole(predictions, targets) * (math.inf if bad else 1)

    ijepa.prediction_loss = stages.prediction_loss = loss


def spoil_rank_1() -> None:
    spoil({1})


def spoil_all() -> None:
    spoil({0, 1})


CASES = {"one rank": (spoil_rank_1, 1), "all ranks": (spoil_all, 1), "a pipeline": (spoil_rank_1, 2)}


def run_with(case: str) -> TrainingRun:
    """Rank 1 is the last stage of a pipeline, which computes its loss."""
    prepare, stages = CASES[case]
    config = tiny_config(
        zero_optimization={"stage": 2 if stages == 1 else 1},
        train_micro_batch_size_per_gpu=4 * stages,
        ijepa__run__name=f"not_finite_{case.replace(' ', '_')}",
        ijepa__run__nonfinite_steps=3,
        ijepa__pipeline={"stages": stages, "largest_bubble": 1.0},
    )
    return run_training(config, 2, prepare=prepare)


@pytest.mark.long
def test_what_is_not_finite_moves_nothing_and_ends_the_run(row: Callable[[str], Row]) -> None:
    losses = row("losses that stay not finite, on 2 ranks")
    for case in CASES:
        run = run_with(case)
        files = list(run.folder.glob("not_finite_step_*.json"))
        if "Traceback" in run.output:
            losses.count("traceback", f"{case}: {run.output[-2000:]}")
        elif set(run.exit_codes) <= {2, -9} and files and moved_nothing(case, json.loads(files[0].read_text())):
            losses.count("refused")
        else:
            losses.count("silent", f"{case}: {run.exit_codes} {run.output[-2000:]}")
    losses.hold(len(CASES))


def moved_nothing(case: str, known: dict[str, Any]) -> bool:
    """Whether the file says so of each step, names the ranks, and has the norms of all weights."""
    ranks = {place["rank"] for step in known["steps"] for place in step["not_finite"]}
    weights = [norm for each in known["last_micro_batch_by_rank"] for norm in each["weights"].values()]
    return (
        not any(step["applied"] for step in known["steps"])
        and ranks == {"one rank": {1}, "all ranks": {0, 1}, "a pipeline": set()}[case]
        and len(weights) > 4
        and all(isinstance(norm, float) for norm in weights)
    )
