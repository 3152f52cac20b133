"""The schedules against the reference's formulas and what it recorded."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

from ijepa_ds.method.schedules import Schedules, build_schedules

RECIPE = {
    "epochs": 300,
    "warmup_epochs": 40,
    "schedule_scale": 1.0,
    "lr_start": 2e-4,
    "lr_peak": 1e-3,
    "lr_final": 1e-6,
    "weight_decay": (0.04, 0.4),
    "momentum": (0.996, 1.0),
}


def schedules(**changes) -> Schedules:
    return build_schedules(**{"steps_per_epoch": 10, **RECIPE, **changes})


@pytest.fixture
def short() -> Schedules:
    """The schedules of the reference's recorded trace: 4 epochs of 3 steps, one epoch of warm-up."""
    return schedules(steps_per_epoch=3, epochs=4, warmup_epochs=1)


def test_what_the_reference_recorded(short):
    now = [short.at(step) for step in range(6)]
    assert [value.lr for value in now] == pytest.approx(
        [
            0.00046666666666666666,
            0.0007333333333333333,
            0.001,
            0.0009698764640825614,
            0.0008831391993379295,
            0.0007502500000000002,
        ],
        rel=1e-14,
    )
    assert [value.weight_decay for value in now] == pytest.approx(
        [0.04613335126796769, 0.06411542731880099, 0.09272077938642143, 0.13, 0.17341257188154627, 0.22], rel=1e-14
    )
    assert [value.momentum for value in now[:4]] == pytest.approx(
        [0.996, 0.9963333333333333, 0.9966666666666667, 0.997], rel=1e-14
    )


def test_the_formulas_of_the_reference_at_every_step_of_a_run():
    run = schedules()
    warmup, total = 400, 3000
    for step in range(total):
        now, s = run.at(step), step + 1  # the reference advances lr and weight decay before it uses them
        if s < warmup:
            lr = 2e-4 + s / warmup * (1e-3 - 2e-4)
        else:
            lr = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (s - warmup) / (total - warmup)))
        assert now.lr == pytest.approx(lr, rel=1e-12)
        decay = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * s / total))
        assert now.weight_decay == pytest.approx(decay, rel=1e-12)
        assert now.momentum == pytest.approx(0.996 + step * (1.0 - 0.996) / total, rel=1e-12)


def test_warm_up_rises_in_a_line_and_peaks_once():
    run = schedules()
    rates = [run.at(step).lr for step in range(3000)]
    assert max(rates) == rates[399] == 1e-3
    rises = [after - before for before, after in pairwise(rates[:400])]
    assert rises == pytest.approx([(1e-3 - 2e-4) / 400] * 399)
    assert all(after < before for before, after in pairwise(rates[399:]))


def test_the_last_step_has_the_final_rate_and_decay_and_one_step_less_of_momentum():
    last = schedules().at(2999)
    assert last.lr == pytest.approx(1e-6, rel=1e-9)
    assert last.weight_decay == pytest.approx(0.4)
    assert last.momentum == pytest.approx(1 - 0.004 / 3000)


@pytest.mark.parametrize("step", [3000, 3001, 10**7])
def test_beyond_the_horizon_every_value_stays_at_its_end(step):
    now = schedules().at(step)
    assert (now.lr, now.weight_decay, now.momentum) == pytest.approx((1e-6, 0.4, 1.0), rel=1e-12)
    assert now.momentum <= 1.0


def test_a_longer_schedule_ends_the_run_before_the_rate_has_fallen():
    """ipe_scale 1.25 of the released configs: the horizon grows, the warm-up does not."""
    scaled = schedules(schedule_scale=1.25)
    assert (scaled.warmup_steps, scaled.horizon) == (400, 3750)
    assert scaled.at(2999).lr > 1e-4 and scaled.at(2999).momentum < 0.9993
    assert scaled.at(3749).lr == pytest.approx(1e-6, rel=1e-9)


def test_fractions_of_an_epoch_are_cut_to_whole_steps():
    cut = schedules(steps_per_epoch=7, epochs=2.5, warmup_epochs=0.5)
    assert (cut.warmup_steps, cut.horizon) == (3, 17)


def test_without_warm_up_the_run_starts_at_the_peak():
    run = schedules(warmup_epochs=0)
    assert run.at(0).lr == pytest.approx(1e-3, rel=1e-5) and run.at(0).lr < 1e-3


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    run = schedules(epochs=4, warmup_epochs=4)
    assert run.at(38).lr < run.at(39).lr == 1e-3


def test_constant_schedules_are_constant():
    run = schedules(weight_decay=(0.05, 0.05), momentum=(0.9, 0.9), lr_start=1e-3, lr_final=1e-3)
    for step in (0, 1, 400, 1500, 2999, 5000):
        now = run.at(step)
        assert (now.lr, now.weight_decay, now.momentum) == pytest.approx((1e-3, 0.05, 0.9), rel=1e-14)


# -------------------------------------------------------------------------------------- constant, then a cool-down


def cooled(epochs: float, cooldown_epochs: float) -> Schedules:
    """20 steps an epoch, one epoch of warm-up."""
    made = schedules(steps_per_epoch=20, epochs=epochs, warmup_epochs=1)
    return dataclasses.replace(made, cooldown_steps=int(20 * cooldown_epochs))


def test_values_stay_until_the_cool_down_and_then_go_to_their_ends():
    run = cooled(10, 2)
    assert [run.at(step).lr for step in range(19)] == pytest.approx([2e-4 + (s + 1) / 20 * 8e-4 for s in range(19)])
    assert {run.at(step) for step in range(19, 160)} == {run.at(50)}
    assert (run.at(50).lr, run.at(50).weight_decay, run.at(50).momentum) == (1e-3, 0.04, 0.996)
    halfway = run.at(179)
    assert halfway.lr == pytest.approx((1e-3 + 1e-6) / 2) and halfway.weight_decay == pytest.approx(0.22)
    last = run.at(199)
    assert (last.lr, last.weight_decay, last.momentum) == pytest.approx((1e-6, 0.4, 1.0))


def test_a_longer_run_has_the_same_values_until_the_shorter_one_cools_down():
    short, long = cooled(10, 2), cooled(50, 5)
    assert all(short.at(step) == long.at(step) for step in range(160))
    assert short.at(160) != long.at(160)
    assert all(cooled(10, 0).at(step) == long.at(step) for step in range(200))  # never cooled down
