"""Training end to end: through DeepSpeed's launcher, as one plain process, and everything that is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed_runs import (
    FOLDER,
    TrainingRun,
    assert_same_tensors,
    bare_run,
    checkpoint_tensors,
    launch_training,
    once,
    plain_beton,
    run_training,
    tiny_config,
    train_beton,
    write_beton,
)

SCALARS = {
    "loss": "train/loss",
    "lr": "schedule/lr",
    "weight_decay": "schedule/weight_decay",
    "momentum": "schedule/momentum",
    "epoch": "schedule/epoch",
    "grad_norm": "train/grad_norm",
    "images_per_second": "speed/images_per_second",
    "processor_seconds": "speed/processor_seconds",
    "loader_wait": "speed/loader_wait",
    "tflops": "speed/tflops",
    "peak_share": "speed/peak_share",
    "context_tokens": "train/context_tokens",
    "target_tokens": "train/target_tokens",
    "rankme": "health/rankme",
    "lidar": "health/lidar",
    "feature_std": "health/feature_std",
    "mean_cosine": "health/mean_cosine",
    "token_variance": "health/token_variance",
    "knn/label": "knn/label",
    "linear/label": "linear/label",
}
EVERYTHING = {
    "ijepa__monitor": {"log_steps": 1, "health_steps": 4, "picture_steps": 4, "knn_epochs": 1},
    "ijepa__checkpoint__steps": 3,
    "ijepa__checkpoint__keep": 2,
}


def with_everything(name: str) -> dict[str, Any]:
    config = tiny_config(ijepa__run__name=name, **EVERYTHING)
    config["ijepa"]["data"]["validation"] = str(train_beton())
    return config


@once
def launched() -> TrainingRun:
    """``deepspeed --num_gpus 2 run.py`` with everything switched on."""
    return launch_training(with_everything("launched"), 2)


@once
def plain() -> TrainingRun:
    """``python run.py`` with everything switched on."""
    return launch_training(with_everything("plain_process"), None)


RUNS = pytest.mark.parametrize("run", [launched, plain], ids=["deepspeed, 2 ranks", "python run.py"])


@RUNS
def test_a_run_ends_well_and_leaves_no_process(run) -> None:
    assert run().exit_codes == [0], run().output
    assert "Traceback" not in run().output and "error:" not in run().output
    assert run().output.count("starting at step 0") == 1 and run().output.count("done: 8 steps") == 1
    name = run().folder.name
    alive = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]]
    assert not [line for line in alive if "run.py" in " ".join(line) and str(FOLDER) in " ".join(line)], name


@RUNS
def test_the_run_folder(run) -> None:
    folder = run().folder
    record = json.loads((folder / "config.json").read_text())
    assert record["images"] == 67 and record["config"]["train_batch_size"] == 16
    assert record["config"]["ijepa"]["data"]["std"] == [0.229, 0.224, 0.225]  # the effective one, defaults filled in
    assert {"torch", "deepspeed", "ffcv", "python"} <= record["versions"].keys() and len(record["commit"]) >= 40
    assert run().checkpoints == ["step_000000006", "step_000000008"]
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == [f"{kind}_{step:08d}.png" for kind in ("features", "masks") for step in (1, 4, 8)]
    assert (folder / "export" / "target_encoder.safetensors").stat().st_size > 10_000
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    unfinished = [str(path) for path in folder.rglob("*") if "tmp" in path.name or ".partial" in path.name]
    assert not unfinished


@RUNS
def test_metrics(run) -> None:
    rows = run().rows
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        missing = {"loss", "lr", "weight_decay", "momentum", "epoch", "grad_norm"} - row.keys()
        assert not missing and all(math.isfinite(value) for value in row.values())
        assert row["context_tokens"] == 18 and row["grad_norm"] > 0 and 0 < row["loss"] < 2
    for row in rows[1:]:
        assert row["images_per_second"] > 0 and 0 <= row["loader_wait"] <= 1 and row["processor_seconds"] > 0
        assert row["tflops"] > 0 and 0 < row["peak_share"] < 1
    assert [row["step"] for row in rows if "rankme" in row] == [4, 8]
    for probe in ("knn/label", "linear/label"):
        assert [row["step"] for row in rows if probe in row] == [1, 4, 8]
    assert rows[7]["linear/label"] > 50  # the classes are colours
    assert rows[3]["epoch"] == 1.0 and rows[7]["epoch"] == 2.0
    assert rows[0]["momentum"] == 0.9 and rows[0]["lr"] == pytest.approx((2e-4 + 1e-3) / 2)
    assert rows[7]["lr"] == pytest.approx(1e-6) and rows[7]["weight_decay"] == pytest.approx(0.4)


@RUNS
def test_tensorboard_holds_the_same_scalars(run) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run().folder))
    events.Reload()
    for name, tag in SCALARS.items():
        logged = {event.step: event.value for event in events.Scalars(tag)}
        assert logged == pytest.approx({row["step"]: row[name] for row in run().rows if name in row}), tag
    assert set(events.Tags()["images"]) == {"pictures/masks", "pictures/features"}
    assert any("config" in tag for tag in events.Tags()["tensors"])


def test_one_and_two_processes_train_alike() -> None:
    assert launched().losses == pytest.approx(plain().losses, rel=5e-3)  # bf16: another order of summation


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_shown_does_not_change_what_is_learnt(world_size: int) -> None:
    """kNN, health, pictures and checkpoints, on against off; and a launcher's processes against forked ones."""
    shown = {1: plain, 2: launched}[world_size]()
    assert bare_run(world_size).losses == shown.losses
    assert_same_tensors(checkpoint_tensors(bare_run(world_size).folder, 8), checkpoint_tensors(shown.folder, 8))


def test_what_is_switched_off_is_off() -> None:
    folder = bare_run(1).folder
    assert not list((folder / "pictures").iterdir())
    assert not any(
        key.startswith(("knn", "linear")) or key in ("rankme", "token_variance")
        for row in bare_run(1).rows
        for key in row
    )
    assert bare_run(1).checkpoints == ["step_000000008"]


def test_activation_checkpointing_gives_the_same_losses() -> None:
    name = "activation_checkpointing"
    run = run_training(tiny_config(ijepa__run__name=name, ijepa__model__activation_checkpointing=True), 1)
    assert run.exit_codes == [0] and run.losses == bare_run(1).losses


def make_a_loss_nan(first: int, last: int) -> None:
    """The ``first`` to ``last`` forward pass; a step has 4."""
    from ijepa_ds.method import ijepa

    whole, calls = ijepa.prediction_loss, []

    def loss(predictions, targets):
        calls.append(1)
        return whole(predictions, targets) * (math.nan if first <= len(calls) <= last else 1)

    ijepa.prediction_loss = loss


def make_one_loss_nan() -> None:
    make_a_loss_nan(11, 11)


def make_all_losses_nan() -> None:
    make_a_loss_nan(9, 10**9)


def test_one_loss_that_is_not_finite_costs_its_step_and_no_more() -> None:
    run = run_training(tiny_config(ijepa__run__name="one_nan"), 1, prepare=make_one_loss_nan)
    assert run.exit_codes == [0] and all(math.isfinite(loss) for loss in run.losses)
    assert run.rows[-1]["skipped_steps"] == 1.0
    assert re.search(
        r"warning: not finite: step 3 \(the loss of samples [\d, ]+, on rank 0; nothing moved\)", run.output
    )


def test_losses_that_stay_not_finite_end_the_run_with_what_is_known_of_them() -> None:
    config = tiny_config(ijepa__run__name="nan", ijepa__checkpoint__steps=1, ijepa__run__nonfinite_steps=2)
    run = run_training(config, 1, prepare=make_all_losses_nan)
    assert run.exit_codes == [2] and run.checkpoints[-1] == "step_000000003"
    error = the_error(run)
    assert error.startswith("error: 2 steps in a row were not finite, up to step 4; lower")
    assert "the checkpoint of step 3 held finite weights when it was written or read" in error
    known = json.loads((run.folder / "not_finite_step_000000004.json").read_text())
    assert known["values"]["loss"] == "nan" and len(known["samples_of_last_step"]) == 16
    (last,) = known["steps"]
    assert [place["micro_batch"] for place in last["not_finite"]] == [0, 1, 2, 3]
    assert [i for place in last["not_finite"] for i in place["samples"]] == known["samples_of_last_step"]
    (examined,) = known["last_micro_batch_by_rank"]
    assert examined["loss"] == "nan" and examined["gradients"]["context_encoder.blocks.0"] == "nan"
    assert 0 < examined["weights"]["predictor.predictor_blocks.0"] < 100


# ------------------------------------------------------------------------------------------------------------ refusals


def forbid_building() -> None:
    """Whatever is refused must be refused before this."""
    from ijepa_ds import train

    def forbidden(*arguments: object) -> None:
        raise AssertionError("a model would have been built")

    train.build_ijepa = forbidden


def the_error(run: TrainingRun) -> str:
    """What the one error says."""
    assert set(run.exit_codes) <= {2, -9}, run.output  # -9: waited for rank 0's report
    assert run.output.count("error:") == 1 and "Traceback" not in run.output, run.output
    return run.output[run.output.index("error:") :]


def refusal(num_processes: int = 1, **changes: Any) -> str:
    return the_error(run_training(tiny_config(**changes), num_processes, prepare=forbid_building))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ijepa__data__imagesize": 32}, ["ijepa.data.imagesize", "did you mean image_size?"]),
        ({"train_batchsize": 16}, ["train_batchsize", "did you mean train_batch_size?"]),
        ({"ijepa__data__train": "/no/such.beton"}, ["/no/such.beton does not exist", "to_ffcv.py"]),
        ({"ijepa__data__validation": "/no/such.beton"}, ["/no/such.beton does not exist"]),
        (
            {"train_batch_size": 128},
            ["train.beton holds 67 images, fewer than one global batch", "train_batch_size = 128"],
        ),
        ({"train_batch_size": 18}, ["train_micro_batch_size_per_gpu = 4 does not divide train_batch_size = 18"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3 cannot be used"]),
        ({"ijepa__model__patch_size": 5}, ["ijepa.model.patch_size = 5 does not divide ijepa.data.image_size = 32"]),
        ({"ijepa__model__width": 36, "ijepa__model__heads": 8}, ["width = 36"]),
        ({"ijepa__model__encoder": "resnet50"}, ["resnet50"]),
        ({"ijepa__masks__context_tokens": 64}, ["context"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer is not used here"]),
        ({"ijepa__run__name": "a/b"}, ["ijepa.run.name"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_error_before_a_model_is_built(changes: dict, says: list[str]) -> None:
    train_beton()
    message = refusal(**{"ijepa__run__name": "refused", **changes})
    for text in says:
        assert text in message
    assert not (FOLDER / "runs" / "refused").exists()


def test_a_run_folder_that_cannot_be_made_is_one_error() -> None:
    run = run_training(tiny_config(ijepa__run__name="refused", ijepa__run__folder="/proc/no"), 1)
    assert "/proc/no/refused cannot be written" in the_error(run) and "ijepa.run.folder" in run.output


def test_mistakes_are_reported_once_for_all_ranks() -> None:
    message = refusal(2, ijepa__run__name="refused", train_micro_batch_size_per_gpu=16)
    assert "train_batch_size = 16 does not divide into 2 processes" in message and "to 8" in message
    assert "/no/such.beton does not exist" in refusal(2, ijepa__data__train="/no/such.beton")


def test_a_mistake_through_the_launcher() -> None:
    run = launch_training(tiny_config(ijepa__run__name="refused", train_micro_batch_size_per_gpu=16), 2)
    assert run.exit_codes == [2], run.output
    assert "does not divide into 2 processes" in the_error(run)


def test_the_folder_of_another_run_is_refused_with_what_differs() -> None:
    message = refusal(**{"ijepa__run__name": bare_run(1).folder.name, "ijepa__model__depth": 1, "ijepa__run__seed": 3})
    assert "belongs to a run with another configuration" in message
    assert "ijepa.model.depth: 2 there, 1 here" in message and "ijepa.run.seed: 0 there, 3 here" in message
    assert message.count("\n  - ") == 2
    before = bare_run(1).rows
    message = refusal(ijepa__run__name=bare_run(1).folder.name, ijepa__data__train=str(fewer_images()))
    assert "images in ijepa.data.train: 67 there, 40 here" in message
    assert bare_run(1).rows == before


@pytest.mark.long
def test_a_run_goes_on_with_its_images_cut_into_files() -> None:
    """On two ranks, with a probe of them; the losses are those of the run that read one file."""
    folder = FOLDER / "cut"
    folder.mkdir()
    for part, (first, end) in enumerate([(0, 30), (30, 31), (31, 67)], 1):
        write_beton(folder / f"train-{part}-of-3.beton", num_images=end - first, first=first)
    changes = {"ijepa__run__name": "cut", "ijepa__run__stop_after_steps": 3}
    assert run_training(tiny_config(**changes), 2).exit_codes == [0, 0]
    changes = {"ijepa__run__name": "cut", "ijepa__monitor__knn_epochs": 1}
    config = tiny_config(**changes, ijepa__data__train=str(folder / "train-*.beton"))
    config["ijepa"]["data"]["validation"] = [str(train_beton())]
    run = run_training(config, 2)
    assert run.exit_codes == [0, 0], run.output
    assert "going on from step 3" in run.output and run.losses == bare_run(2).losses
    assert run.rows[-1]["knn/label"] > 50
    config["ijepa"]["data"]["train"] = [str(folder / f"train-{part}-of-3.beton") for part in (1, 3)]
    assert "part 2 is not among the files" in the_error(run_training(config, 2))


@once
def fewer_images() -> Path:
    return write_beton(FOLDER / "fewer.beton", num_images=40)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole() -> None:
    """Its log too: what was logged after that checkpoint is taken back."""
    config = tiny_config(ijepa__run__name="gone_back", ijepa__checkpoint__steps=3)
    whole = run_training(config, 1)
    path = whole.folder / "checkpoints" / "step_000000008" / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    losses, run = whole.losses, run_training(config, 1)
    assert run.exit_codes == [0] and run.output.count("warning: ") == 1, run.output
    assert "step_000000008/rank_00000.safetensors is damaged (" in run.output
    assert "going on from step 6" in run.output and "starting" not in run.output
    assert [row["step"] for row in run.rows] == list(range(1, 9)) and run.losses == losses
    assert run.checkpoints == ["step_000000003", "step_000000006", "step_000000008"]  # the damaged one is gone


def test_a_run_without_a_whole_checkpoint_is_one_error() -> None:
    folder = FOLDER / "damaged_run" / bare_run(2).folder.name
    shutil.copytree(bare_run(2).folder, folder)
    os.truncate(folder / "checkpoints" / "step_000000008" / "rank_00001.safetensors", 5000)
    run = run_training(tiny_config(ijepa__run__name=folder.name, ijepa__run__folder=str(folder.parent)), 2)
    assert set(run.exit_codes) <= {2, -9} and 2 in run.exit_codes and "Traceback" not in run.output
    assert "no checkpoint in" in run.output and "rank_00001.safetensors is damaged" in run.output


def test_data_without_labels_trains_without_nearest_neighbours() -> None:
    config = tiny_config(ijepa__run__name="plain_images", ijepa__run__stop_after_steps=1)
    config["ijepa"]["data"].update(train=str(plain_beton()), validation=str(plain_beton()))
    config["ijepa"]["monitor"]["knn_epochs"] = 1
    run = run_training(config, 1)
    assert run.exit_codes == [0], run.output
    assert not {"knn/label", "linear/label"} & run.rows[0].keys()


def test_a_run_of_less_than_a_step_takes_one() -> None:
    changes = {"ijepa__optimization__epochs": 0.01, "ijepa__optimization__warmup_epochs": 0}
    run = run_training(tiny_config(ijepa__run__name="short", **changes), 1)
    assert run.exit_codes == [0], run.output
    assert [row["step"] for row in run.rows] == [1]
