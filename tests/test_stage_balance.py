"""Cutting layers into stages, against all ways there are."""

from __future__ import annotations

import itertools
import random

import pytest

from ijepa_ds.stage_balance import bubble, split_layers


def test_no_way_to_cut_is_better() -> None:
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.choice([0, 1, 2, 7.3, draw.random()]) for _ in range(draw.randint(1, 9))]
        stages = draw.randint(1, len(costs))
        bounds = split_layers(costs, stages)
        assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == stages + 1
        assert all(start < stop for start, stop in itertools.pairwise(bounds))
        ways = itertools.combinations(range(1, len(costs)), stages - 1)
        best = min(dearest(costs, [0, *cuts, len(costs)]) for cuts in ways)
        assert dearest(costs, bounds) == pytest.approx(best)


def dearest(costs: list[float], bounds: list[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))


def test_a_stage_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        split_layers([1, 1], 3)


def test_one_stage_waits_for_nobody() -> None:
    assert bubble(1, 4) == 0 and bubble(4, 12) == 0.2
