"""Time of a step: products by hand, and when transfers show."""

from __future__ import annotations

from pathlib import Path

import pytest
from planning import make_plan, write_tiny

from ijepa_ds.plan.predict import numbers
from ijepa_ds.plan.timing import LINK_EFFICIENCY, step_time, traffic_of
from ijepa_ds.stage_balance import bubble


def test_the_products_take_their_share_of_the_peak() -> None:
    plan = make_plan("vith14", efficiency=0.4)
    seconds = step_time(plan.work, plan.cluster, 0.4)
    assert seconds.arithmetic == pytest.approx(2048 * plan.work.flops.total / (0.4 * 312e12))
    told = numbers(plan)
    assert told["images_per_second"] == pytest.approx(2048 / seconds.total)
    assert told["hours"] == pytest.approx(300 * (1_281_167 // 2048) * seconds.total / 3600)
    assert seconds.reduce_exposed == seconds.average_exposed == seconds.weights_exposed == 0  # nobody to talk to


def test_what_travels_between_sixteen_gpus_by_hand() -> None:
    plan = make_plan("vith14", gpus=16, interconnect="efa-400")
    work, traffic = plan.work, traffic_of(plan.work, 16)
    assert traffic.reduced == traffic.gathered_weights == 2 * work.parameters
    assert traffic.gathered_average == 2 * work.encoder_parameters
    seconds = step_time(work, plan.cluster, 0.5)
    ring = 15 / 16 / (LINK_EFFICIENCY * 50e9)
    assert seconds.average_exposed == pytest.approx(2 * work.encoder_parameters * ring)
    assert seconds.reduce_exposed + seconds.reduce_hidden == pytest.approx(4 * work.parameters * ring)
    assert seconds.reduce_exposed == pytest.approx(4 * 50_000_000 * ring)  # the last bucket
    assert seconds.weights_exposed == 0  # beside the target encoder's pass


def test_under_zero_2_every_micro_batch_sums_all_gradients() -> None:
    few, many = (make_plan("vith14", f"train_micro_batch_size_per_gpu={size}", gpus=16) for size in (128, 16))
    assert traffic_of(many.work, 16).reduced == 8 * traffic_of(few.work, 16).reduced
    assert many.hours() > few.hours()


def test_a_slow_network_shows() -> None:
    fast, slow = (make_plan("vith14", gpus=16, interconnect=name) for name in ("ib-400", "10gbe"))
    seconds = step_time(slow.work, slow.cluster, 0.5)
    assert seconds.weights_exposed > 0
    assert seconds.reduce_hidden == pytest.approx(2 / 3 * (seconds.context_encoder + seconds.predictor))
    assert slow.hours() > 2 * fast.hours()


def test_stages_wait_for_one_another(tmp_path: Path) -> None:
    overrides = ("zero_optimization.stage=1", "ijepa.pipeline.stages=2", "ijepa.pipeline.largest_bubble=1")
    plan = make_plan(write_tiny(tmp_path), *overrides, gpus=4)
    seconds = step_time(plan.work, plan.cluster, 0.5)
    trained = seconds.context_encoder + seconds.predictor
    waits = bubble(2, 8)  # 64 images of two pipelines, four at once
    assert seconds.bubble >= trained * waits / (1 - waits)  # more where one stage has more to do than the other
    assert seconds.stages_exposed > 0
    assert numbers(plan)["batch"]["bubble"] == waits


def test_checkpointing_computes_the_forward_pass_of_what_is_trained_again() -> None:
    plan = make_plan("vith14", "ijepa.model.activation_checkpointing=true")
    seconds = step_time(plan.work, plan.cluster, 0.5)
    assert seconds.recomputed == (seconds.context_encoder + seconds.predictor) / 3
