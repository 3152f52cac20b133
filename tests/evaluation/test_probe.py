"""``python -m ijepa_ds evaluate`` on a tiny run: the table, the file, and every refusal in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from distributed_runs import (
    FOLDER,
    TrainingRun,
    once,
    plain_beton,
    run_command_forked,
    run_training,
    tiny_config,
    train_beton,
    write_beton,
    write_config,
)


@once
def trained() -> TrainingRun:
    config = tiny_config(ijepa__run__name="probed", ijepa__run__stop_after_steps=2, ijepa__optimization__epochs=1)
    return run_training(config, 1)


@once
def validation_beton() -> Path:
    return write_beton(FOLDER / "validation.beton", num_images=40)


def evaluate(*arguments: object) -> tuple[int, str]:
    """Exit code and output of the command."""
    return run_command_forked("evaluate", *arguments)


@once
def evaluated() -> tuple[int, str]:
    data = ("--train", train_beton(), "--validation", validation_beton())
    return evaluate("--checkpoint", trained().folder, *data, "--random-seeds", 2)


def test_the_table_has_both_baselines_for_every_label() -> None:
    code, output = evaluated()
    assert code == 0, output
    table = output[output.index("trained", output.index("measuring")) :]
    for column in ("trained", "random", "pixels", "margin"):
        assert column in output
    for label in ("label", "depth"):
        for probe in ("linear", "knn"):
            rows = [line for line in table.splitlines() if line.split()[:2] == [label, probe]]
            assert [line.split()[2] for line in rows] == ["last", "last4"]
            assert all("±" in line and "points" in line and " sd" in line for line in rows)
    assert f"measuring the TARGET encoder of {trained().folder} at step 2" in output


def test_results_json() -> None:
    assert evaluated()[0] == 0
    results = json.loads((trained().folder / "evaluation" / "results.json").read_text())
    assert results["encoder"] == "target" and results["config"]["train_batch_size"] == 16
    found = {(s["encoder"], s["seed"], s["label"], s["features"]) for s in results["scores"]}
    encoders = [("trained", 0), ("random", 0), ("random", 1)]
    expected = {
        (*e, label, features) for e in encoders for label in ("label", "depth") for features in ("last", "last4")
    }
    assert found == expected | {("pixels", 0, label, "pixels") for label in ("label", "depth")}
    for score in results["scores"]:
        assert 0 <= score["linear"] <= 100 and 0 <= score["knn"] <= 100
        assert (score["mean_absolute_error"] is None) == (score["label"] == "label")
    # The classes are colours: anything that has seen an image knows them, and a mix-up of rows would not.
    assert all(s["linear"] > 80 for s in results["scores"] if s["label"] == "label" and s["encoder"] == "pixels")


def test_a_file_of_weights_gives_the_same_numbers() -> None:
    assert evaluated()[0] == 0
    out = FOLDER / "probe_of_a_file"
    code, output = run_command_forked("export", trained().folder, "--out", out)
    assert code == 0, output
    config = write_config(tiny_config())
    data = ("--train", train_beton(), "--validation", validation_beton(), "--random-seeds", 2)
    code, output = evaluate("--checkpoint", out / "target_encoder.safetensors", "--config", config, *data)
    assert code == 0, output
    of_the_file = json.loads((out / "evaluation" / "results.json").read_text())["scores"]
    assert of_the_file == json.loads((trained().folder / "evaluation" / "results.json").read_text())["scores"]


def damaged_run(what: str) -> Path:
    folder = FOLDER / f"probe_{what}"
    shutil.copytree(trained().folder, folder)
    if what == "no_checkpoint":
        shutil.rmtree(folder / "checkpoints")
    elif what == "config_garbage":
        (folder / "config.json").write_text("{")
    elif what == "config_empty":
        (folder / "config.json").write_text("{}")
    return folder


def refusals() -> dict[str, tuple[list[object], list[str]]]:
    run, train = trained().folder, train_beton()
    weights = FOLDER / "probe_weights.safetensors"
    shutil.copy(FOLDER / "probe_of_a_file" / "target_encoder.safetensors", weights)
    (FOLDER / "no_weights.safetensors").write_bytes(b"nothing")
    wider = write_config(tiny_config(ijepa__model__width=48))
    data = ["--train", train, "--validation", train]
    return {
        "no labels": (["--checkpoint", run, "--train", plain_beton(), "--validation", train], ["share no label field"]),
        "no validation": (["--checkpoint", run], ["nothing to measure on", "--validation"]),
        "missing run": (["--checkpoint", "/no/run", *data], ["/no/run does not exist"]),
        "no run": (["--checkpoint", FOLDER, *data], [str(FOLDER), "not a run folder"]),
        "no checkpoint": (["--checkpoint", damaged_run("no_checkpoint"), *data], ["has no checkpoint yet"]),
        "config garbage": (["--checkpoint", damaged_run("config_garbage"), *data], ["config.json"]),
        "config empty": (["--checkpoint", damaged_run("config_empty"), *data], ["config.json"]),
        "missing data": (
            ["--checkpoint", run, "--train", "/no.beton", "--validation", train],
            ["/no.beton does not exist"],
        ),
        "weights without config": (["--checkpoint", weights, *data], ["--config FILE.json"]),
        "weights of another size": (
            ["--checkpoint", weights, "--config", wider, *data],
            ["does not fit", "tensors differ"],
        ),
        "no weights": (
            ["--checkpoint", FOLDER / "no_weights.safetensors", "--config", wider, *data],
            ["not a readable safetensors file"],
        ),
        "one seed": (["--checkpoint", run, *data, "--random-seeds", 1], ["--random-seeds must be at least 2"]),
        "no images": (["--checkpoint", run, *data, "--train-images", 0], ["--train-images"]),
    }


CASES = (
    "no labels,no validation,missing run,no run,no checkpoint,config garbage,config empty,missing data,"
    "weights without config,weights of another size,no weights,one seed,no images"
)


@pytest.mark.parametrize("case", CASES.split(","))
def test_a_mistake_is_one_sentence(case: str) -> None:
    test_a_file_of_weights_gives_the_same_numbers_once()
    arguments, says = all_refusals()[case]
    code, output = evaluate(*arguments)
    assert code == 2, output
    error = output[output.index("error:") :].strip()
    assert output.count("error:") == 1 and "Traceback" not in output and "\n" not in error, output
    for text in says:
        assert text in error


test_a_file_of_weights_gives_the_same_numbers_once = once(test_a_file_of_weights_gives_the_same_numbers)
all_refusals = once(refusals)
