"""What a plan advises."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from planning import ROOT, make_plan

from ijepa_ds.plan.figure import over_gpus
from ijepa_ds.plan.predict import advice, numbers

SHIPPED = {
    "vith14": 16,
    "vith16_448": 16,
    "vitg16_in22k": 16,
    "vitl16": 16,
    "vitb16": 8,
    "vitb16_ep100": 8,
    "vits16_single_gpu": 1,
}


@pytest.mark.parametrize(("name", "gpus"), SHIPPED.items())
def test_the_large_configurations_need_no_advice(name: str, gpus: int) -> None:
    gpu = "rtx3090" if gpus == 1 else "a100-80"
    assert advice(make_plan(name, gpus=gpus, gpu=gpu)) == []


def test_every_large_configuration_is_planned() -> None:
    files = {path.stem for path in Path(ROOT / "ds_configs").glob("vit*.json")}
    assert {name for name in files if "pp" not in name} == SHIPPED.keys()


def test_checkpointing_that_is_not_needed_is_said() -> None:
    plan = make_plan("vitg16_in22k", "ijepa.model.activation_checkpointing=true", gpus=16)
    assert numbers(plan)["checkpointing_needed"] is False
    assert "activation_checkpointing is not needed" in advice(plan)[0] and "saves 14% of the time" in advice(plan)[0]


def test_accumulation_that_is_not_needed_is_said() -> None:
    plan = make_plan("vith16_448", "train_micro_batch_size_per_gpu=16", gpus=16)
    (sentence,) = advice(plan)
    assert "train_micro_batch_size_per_gpu = 64 makes 2 of the 8 micro-batches" in sentence


def test_too_little_memory_has_its_cures() -> None:
    plan = make_plan("vith14", gpu="a100-40")
    assert advice(plan) == [
        "39.9 GB do not fit on A100 40GB (38 GB of use)",
        "set train_micro_batch_size_per_gpu to 64: the recipe stays the same",
        "or set ijepa.model.activation_checkpointing to true: a third more arithmetic in what is trained",
    ]
    assert numbers(plan)["fits"] is False


def test_a_model_that_no_gpu_holds_needs_stages() -> None:
    huge = ("ijepa.model.width=6400", "ijepa.model.depth=64", "ijepa.model.heads=64")
    plan = make_plan("vith14", *huge, gpus=16)
    told = numbers(plan)
    assert told["largest_micro_batch"] is None and told["stages_needed"] is True
    assert "more of ijepa.pipeline.stages" in told["advice"][-1]


def test_stages_that_are_not_needed_are_said() -> None:
    staged = ("zero_optimization.stage=1", "ijepa.pipeline.stages=4", "train_micro_batch_size_per_gpu=32")
    assert advice(make_plan("vith14", *staged, gpus=16))[-1].startswith("stages are not needed")


def test_the_loader_needs_threads_and_the_file_needs_memory() -> None:
    plan = make_plan("vits16_single_gpu", "ijepa.data.workers=2", gpu="rtx4090", host_memory=64)
    told = numbers(plan)
    assert told["loader"]["beton_stays_in_memory"] is False
    threads, memory = told["advice"]
    assert "set ijepa.data.workers to 6" in threads and "64 GB cannot keep the 66 GB" in memory


def test_over_numbers_of_gpus_the_state_shrinks_and_the_batch_stays() -> None:
    rows = over_gpus(make_plan("vith14", gpus=16))
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert all(2048 % (row["gpus"] * row["micro_batch"]) == 0 for row in rows)
    for fewer, more in itertools.pairwise(rows):
        assert more["state_gb"] < fewer["state_gb"] and more["hours"] < fewer["hours"]
        assert more["gpu_hours"] >= fewer["gpu_hours"]  # nobody gets more than in proportion
    assert rows[4]["hours"] == pytest.approx(make_plan("vith14", gpus=16).hours())
