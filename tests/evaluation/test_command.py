"""``python -m ijepa_ds evaluate`` on a tiny run: the table, the file, and every refusal in one sentence."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from distributed_runs import (
    FOLDER,
    TrainingRun,
    once,
    plain_beton,
    run_command_forked,
    run_ranks,
    run_training,
    tiny_config,
    train_beton,
    write_beton,
    write_config,
)
from made_up_masks import write_dense_folder
from safetensors.torch import load_file

from ijepa_ds.engine.checkpoint_files import open_checkpoint, state_json
from ijepa_ds.engine.rank_files import Contents, write_rank_file
from ijepa_ds.evaluation.compare import main as compare_main
from ijepa_ds.evaluation.results import Results, read_results
from ijepa_ds.evaluation.subject import load_subject
from ijepa_ds.files import checksum


@once
def trained() -> TrainingRun:
    config = tiny_config(ijepa__run__name="probed", ijepa__run__stop_after_steps=2, ijepa__optimization__epochs=1)
    return run_training(config, 1)


@once
def validation_beton() -> Path:
    return write_beton(FOLDER / "validation.beton", num_images=40)


@once
def dense_folder() -> Path:
    return write_dense_folder(FOLDER / "dense", train=7, val=5)


def evaluate(*arguments: object) -> tuple[int, str]:
    """Exit code and output of the command, without pictures, which take a second or two."""
    return run_command_forked("evaluate", *arguments, "--no-pictures")


@once
def evaluated() -> tuple[int, str]:
    data = ("--train", train_beton(), "--validation", validation_beton())
    return run_command_forked("evaluate", "--checkpoint", trained().folder, *data, "--random-seeds", 2)


def test_the_table_has_both_baselines_for_every_label() -> None:
    code, output = evaluated()
    assert code == 0, output
    table = output[output.index("trained", output.index("margin") - 60) :]
    for column in ("trained", "random", "pixels", "margin"):
        assert column in output
    for label in ("label", "depth"):
        for probe in ("logistic", "knn"):
            rows = [line for line in table.splitlines() if line.split()[:2] == [label, probe]]
            assert {line.split()[2].rstrip("*") for line in rows} == {"last", "last4"}
            assert sum("*" in line for line in rows) == 1
            assert all("±" in line and "points" in line and " sd" in line for line in rows)
    assert f"measuring the TARGET encoder of {trained().folder} at step 2" in output
    before_the_table = output[: output.index("margin")]
    assert "%" not in before_the_table  # nothing is told without its baselines


def test_results_json() -> None:
    assert evaluated()[0] == 0
    results = read_results(trained().folder / "evaluation" / "results.json")
    assert results.encoder == "target" and results.config["train_batch_size"] == 16 and results.schema == 1
    assert results.checkpoint_sha256 == checksum(trained().folder / "checkpoints" / "step_000000002")
    assert {(t.task, t.label) for t in results.tasks} == set(itertools.product(("logistic", "knn"), ("label", "depth")))
    for task in results.tasks:
        assert task.value == max(head["value"] for head in task.grid) and "value" not in task.best_head
        assert {head["features"] for head in task.grid} == {"last", "last4"}
        assert len(task.baselines["random"]["values"]) == 2 and len(task.baselines["pixels"]["values"]) == 1
        assert all(0 <= v <= 100 for baseline in task.baselines.values() for v in baseline["values"])
        assert (task.train_images, task.validation_images) == (67, 40)
        if task.task == "logistic":
            assert sum(map(sum, task.confusion)) == 40
            right = sum(task.confusion[k][k] for k in range(len(task.confusion)))
            assert task.value == pytest.approx(100 * right / 40)
            assert ("mean_absolute_error" in task.extra) == (task.label == "depth")
            assert ("mean_absolute_error" in task.baselines["random"]) == (task.label == "depth")
    # The classes are colours: anything that has seen an image knows them, and a mix-up of rows would not.
    logistic = next(t for t in results.tasks if (t.task, t.label) == ("logistic", "label"))
    assert logistic.baselines["pixels"]["values"][0] > 80


def test_pictures_are_drawn_and_named_and_the_same_in_tensorboard() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = trained().folder / "evaluation"
    output = evaluated()[1]
    assert "warning: " not in output
    names = {path.stem for path in (folder / "pictures").iterdir()}
    assert names == {
        *("confusion_logistic_label", "confusion_logistic_depth", "regression_depth_logistic"),
        *("baselines", "neighbours"),
    }
    listed = output[output.index(f"pictures in {folder / 'pictures'}: ") :]
    assert all(f"{name}.png" in listed for name in names)
    assert output.index("written: ") < output.index("pictures in ")
    events = EventAccumulator(str(folder / "tensorboard" / "trained")).Reload()
    assert set(events.Tags()["images"]) == {f"evaluation/{name}" for name in names}


def test_compare_reads_what_evaluate_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated()[0] == 0
    files = [trained().folder, FOLDER / "grids"]
    tasks = [*read_results(files[0] / "evaluation" / "results.json").tasks, *grids().tasks]
    assert compare_main([*map(str, files), "--paper", "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["warnings"] == [] and len(comparison["rows"]) == len(tasks)
    for row, task in zip(comparison["rows"], tasks, strict=True):
        (cell,) = [cell for cell in row["cells"] if cell is not None]
        assert (row["task"], row["label"].split(" (")[0], cell["value"]) == (task.task, task.label, task.value)
        assert cell["random"] == pytest.approx(statistics.mean(task.baselines["random"]["values"]))
        assert cell["pixels"] == task.baselines["pixels"]["values"][0] and cell["train_images"] == task.train_images
    papers = {row["task"]: row["paper"].get("H/14") for row in comparison["rows"]}
    assert (papers["lowshot"], papers["transfer"], papers["attentive"]) == (73.3, 87.5, None)
    assert compare_main(list(map(str, files))) == 0
    assert "label/3" in capsys.readouterr().out


def scores_of(path: Path) -> list[tuple]:
    return [(t.task, t.label, t.grid, t.baselines, t.confusion) for t in read_results(path).tasks]


def test_a_file_of_weights_gives_the_same_numbers() -> None:
    assert evaluated()[0] == 0
    out = FOLDER / "probe_of_a_file"
    code, output = run_command_forked("export", trained().folder, "--out", out)
    assert code == 0, output
    config = write_config(tiny_config())
    data = ("--train", train_beton(), "--validation", validation_beton(), "--random-seeds", 2)
    code, output = evaluate("--checkpoint", out / "target_encoder.safetensors", "--config", config, *data)
    assert code == 0, output
    of_the_run = scores_of(trained().folder / "evaluation" / "results.json")
    assert scores_of(out / "evaluation" / "results.json") == of_the_run


def test_files_of_others_say_which_encoder_they_hold() -> None:
    released = {"target_encoder": released_names(), "encoder": released_names()}
    torch.save(released, FOLDER / "released.pth.tar")
    data = ("--train", train_beton(), "--validation", validation_beton(), "--random-seeds", 1, "--task", "knn")
    data = (*data, "--heads", 2, "--out")
    code, output = evaluate("--checkpoint", FOLDER / "released.pth.tar", *data, FOLDER / "others")
    assert code == 0, output
    assert f"measuring the TARGET encoder of {FOLDER / 'released.pth.tar'}, target_encoder" in output
    results = read_results(FOLDER / "others" / "results.json")
    assert results.encoder == "target" and results.config["ijepa"]["model"]["width"] == 32
    assert results.checkpoint_sha256 == hashlib.sha256((FOLDER / "released.pth.tar").read_bytes()).hexdigest()
    # timm's names, and nothing that says which of the two it is.
    torch.save(load_file(exported_weights()), FOLDER / "timm.pth")
    subject = load_subject(FOLDER / "timm.pth", heads=2)
    assert subject.role == "unknown" and subject.describe().startswith("an encoder that does not say which it is of ")


def exported_weights() -> Path:
    test_a_file_of_weights_gives_the_same_numbers_once()
    return FOLDER / "probe_of_a_file" / "target_encoder.safetensors"


def released_names() -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in load_file(exported_weights()).items()}


GRIDS = (
    *("--task", "linear", "depth", "transfer", "lowshot", "attentive", "dense", "--preset", "cifar100", "--epochs", 3),
    *("--random-seeds", 1, "--per-class", 3, "--draws", 2, "--finetune", "--finetune-lr", 1e-3, "--no-pictures"),
)


@once
def grids() -> Results:
    out = FOLDER / "grids"
    data = ("--train", train_beton(), "--validation", validation_beton(), "--dense-data", dense_folder(), "--out", out)
    code, output = run_command_forked("evaluate", "--checkpoint", trained().folder, *data, *GRIDS)
    assert code == 0, output
    assert not (out / "pictures").exists() and "%" not in output[: output.index("margin")]
    assert "the batch of 16384 becomes 67: there are no more training images" in output
    assert all(f"{word} " in output for word in ("norm", "lr", "weight_decay")) and " sd" not in output
    return read_results(out / "results.json")


def test_the_head_grids_of_three_protocols() -> None:
    tasks = {task.task: task for task in grids().tasks if task.task in ("linear", "depth", "transfer")}
    assert {name: (task.label, len(task.grid)) for name, task in tasks.items()} == {
        "linear": ("label", 48),
        "depth": ("depth", 4),
        "transfer": ("label", 4),
    }
    assert (
        tasks["linear"].extra["augmentation"] == tasks["transfer"].extra["augmentation"] == "random resized crop, flip"
    )
    assert tasks["depth"].extra["augmentation"] == "flip"
    assert {head["lr"] for head in tasks["transfer"].grid} == {0.01 * 67 / 256}
    for task in tasks.values():
        assert {(h["features"], h["norm"]) for h in task.grid} == set(
            itertools.product(("last", "last4"), ("linear", "bn"))
        )
        assert {h["features"] for h in task.baselines["pixels"]["grids"][0]} == {"pixels"}
        assert sum(map(sum, task.confusion)) == 40 and task.extra["epochs"] == 3
    errors = [tasks["depth"].extra["mean_absolute_error"], *tasks["depth"].baselines["pixels"]["mean_absolute_error"]]
    assert all(0 < error < 1.5 for error in errors)
    assert len(tasks["depth"].extra["true_values"]) == len(tasks["depth"].extra["predicted_values"]) == 40


def test_low_shot_by_three_methods() -> None:
    (task,) = [task for task in grids().tasks if task.task == "lowshot"]
    assert (task.label, task.train_images, task.extra["images"]) == ("label/3", 12, [12, 12])
    counts = {method: sum(head["method"] == method for head in task.grid) for method in task.extra["methods"]}
    assert counts == {"logistic": 2, "grid": 48, "finetune": 1}
    for head in task.grid:
        assert len(head["values"]) == 2 and head["value"] == pytest.approx(statistics.mean(head["values"]))
        assert head["deviation"] == pytest.approx(statistics.stdev(head["values"]))
    assert task.value == max(head["value"] for head in task.extra["methods"].values())
    assert task.extra["methods"][task.extra["best_method"]]["value"] == task.value
    assert task.extra["finetuning"]["epochs"] == 3 and task.extra["finetuning"]["lr"] == 1e-3
    best = next(head for head in task.grid if head["value"] == task.value)
    right = sum(task.confusion[k][k] for k in range(4))
    assert 100 * right / 40 == pytest.approx(best["values"][0])  # the first draw's
    (random,), (pixels,) = (task.baselines[name]["grids"] for name in ("random", "pixels"))
    assert "finetune" in {head["method"] for head in random}
    assert {head["method"] for head in pixels} == {"logistic", "grid"} and {h["features"] for h in pixels} == {"pixels"}


def test_attentive_probes() -> None:
    (task,) = [task for task in grids().tasks if task.task == "attentive"]
    assert (task.label, len(task.grid), task.train_images) == ("label", 9, 67)
    assert task.extra["augmentation"] == "random resized crop, flip" and task.extra["batch"] == 67
    assert {head["features"] for head in task.grid + task.baselines["random"]["grids"][0]} == {"tokens"}
    assert task.baselines["pixels"]["values"][0] > 80 and sum(map(sum, task.confusion)) == 40


def test_dense_probes_of_patches() -> None:
    tasks = {(task.task, task.label): task for task in grids().tasks if task.task.startswith("dense")}
    assert tasks.keys() == set(itertools.product(("dense_linear", "dense_knn"), ("segmentation", "depth")))
    for (method, label), task in tasks.items():
        assert (task.train_images, task.validation_images, task.extra["patches"]) == (7, 5, 7 * 64)
        assert [head["features"] for head in task.grid] == (["last", "last4"] if method == "dense_linear" else ["last"])
        (pixels,), better = task.baselines["pixels"]["values"], min if label == "depth" else max
        assert task.value == better(head["value"] for head in task.grid)
        if label == "depth":
            assert (task.metric, task.unit) == ("RMSE", "") and pixels < 0.7 < task.extra["position_alone"]
        else:
            assert (task.metric, task.unit) == ("mean IoU", "%") and pixels > 85 > task.extra["position_alone"]
            assert sum(map(sum, task.confusion)) == 5 * 32 * 32
            hits, row, column = task.confusion[1][1], task.confusion[1], [row[1] for row in task.confusion]
            assert task.extra["iou"][1] == pytest.approx(100 * hits / (sum(row) + sum(column) - hits), abs=1e-4)


def test_scalars_for_tensorboard() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = grids()
    for name in ("trained", "random", "pixels"):
        events = EventAccumulator(str(FOLDER / "grids" / "tensorboard" / name)).Reload()
        for task in results.tasks:
            (event,) = events.Scalars(f"evaluation/{task.task}/{task.label}")
            expected = task.value if name == "trained" else task.baselines[name]["values"][0]
            assert event.step == 2 and event.value == pytest.approx(expected)
            if task.task == "depth":
                (event,) = events.Scalars("evaluation/depth/depth/mean_absolute_error")
                errors = (task.extra if name == "trained" else task.baselines[name])["mean_absolute_error"]
                assert event.value == pytest.approx(errors if name == "trained" else errors[0])


def evaluate_on_ranks(arguments: list[str]) -> None:
    from ijepa_ds.evaluation.command import main

    main(arguments)


def test_two_processes_measure_what_one_does() -> None:
    out = FOLDER / "grids_of_two"
    data = ("--train", train_beton(), "--validation", validation_beton(), "--dense-data", dense_folder(), "--out", out)
    # As `deepspeed --module ijepa_ds evaluate ...` starts them; __main__ has taken the launcher's option away.
    run_ranks(evaluate_on_ranks, 2, list(map(str, ("--checkpoint", trained().folder, *data, *GRIDS))))
    both = read_results(out / "results.json")
    assert both.options["processes"] == 2
    for one, two in zip(grids().tasks, both.tasks, strict=True):
        assert (one.task, one.label, one.grid[0].keys()) == (two.task, two.label, two.grid[0].keys())
        differences = [abs(a["value"] - b["value"]) for a, b in zip(one.grid, two.grid, strict=True)]
        # Sums are taken in another order, which moves an image or two over a boundary.
        assert max(differences) <= 5.1 and sum(differences) / len(differences) < 1


def test_a_class_without_images_is_said() -> None:
    named = named_classes("empty", "a b c d nobody")
    data = ("--train", named, "--validation", named, "--random-seeds", 1, "--out", FOLDER / "empty")
    code, output = evaluate("--checkpoint", trained().folder, *data, "--task", "knn", "--label", "label")
    assert code == 0 and output.count("1 classes have no image in use and are left out: nobody") == 1, output


def test_a_mistake_that_all_processes_see_is_told_once() -> None:
    with pytest.raises(AssertionError) as caught:
        data = ["--train", train_beton(), "--validation", validation_beton(), "--task", "count"]
        run_ranks(evaluate_on_ranks, 2, list(map(str, ("--checkpoint", trained().folder, *data))))
    assert "rank 0:" in str(caught.value) and str(caught.value).count("no label field 'count'") == 1


def test_cached_features_and_another_image_size() -> None:
    out = FOLDER / "cached"
    data = ("--train", train_beton(), "--validation", validation_beton(), "--out", out, "--random-seeds", 1)
    some = ("--train-images", 60, "--label", "label", "--lr", 0.1, 0.01, "--batch", 20, "--epochs", 30)
    grid = ("--task", "linear", "attentive", "--cached", "--image-size", 24, *some)
    code, output = evaluate("--checkpoint", trained().folder, *data, *grid)
    assert code == 0, output
    results = read_results(out / "results.json")
    assert results.config["ijepa"]["data"]["image_size"] == [24, 24]
    linear, logistic, attentive = results.tasks
    assert (linear.task, logistic.task, attentive.task) == ("linear", "logistic", "attentive")
    assert attentive.extra["augmentation"] == "none" and {head["lr"] for head in attentive.grid} == {0.1, 0.01}
    assert linear.extra["augmentation"] == "none" and linear.train_images == 60
    assert {head["lr"] for head in linear.grid} == {0.1, 0.01, 0.1 * 20 / 256, 0.01 * 20 / 256}
    assert linear.baselines["pixels"]["values"][0] > 80  # it learns
    assert attentive.value > 60, attentive.grid


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
        "weights without config": (["--checkpoint", weights, *data], ["a width of 32", "--config"]),
        "weights of another size": (
            ["--checkpoint", weights, "--config", wider, *data],
            ["does not fit", "patch_embed.proj.weight is [32, 3, 4, 4], not [48, 3, 4, 4]"],
        ),
        "no weights": (
            ["--checkpoint", FOLDER / "no_weights.safetensors", "--config", wider, *data],
            ["no_weights.safetensors cannot be read"],
        ),
        "no seed": (["--checkpoint", run, *data, "--random-seeds", 0], ["--random-seeds = 0 must be at least 1"]),
        "not a dense folder": (
            ["--checkpoint", run, "--task", "dense", "--dense-data", FOLDER],
            ["none of the known layouts", "annotations"],
        ),
        "no preset": (["--checkpoint", run, *data, "--task", "transfer"], ["--preset", "cifar100"]),
        "no such label": (["--checkpoint", run, *data, "--label", "size"], ["no label field 'size'", "label, depth"]),
        "no count": (["--checkpoint", run, *data, "--task", "count"], ["no label field 'count'", "--label"]),
        "not a size": (["--checkpoint", run, *data, "--image-size", 30], ["multiple", "patches of 4 pixels"]),
        "other classes": (
            [
                "--checkpoint",
                run,
                "--train",
                named_classes("train", "cat dog"),
                "--validation",
                named_classes("val", "cat fox"),
            ],
            ["only", "has dog", "has fox"],
        ),
        "a class only in validation": (
            ["--checkpoint", run, "--train", train, "--validation", train, "--train-images", 3, "--label", "label"],
            ["of which no training image is used: "],
        ),
        "broken run": (
            ["--checkpoint", overflowing_run(), *data],
            ["hold NaN or infinity"],
        ),
        "broken run, augmented": (
            ["--checkpoint", overflowing_run(), *data, "--task", "linear", "--epochs", 1],
            ["hold NaN or infinity"],
        ),
        "no images": (["--checkpoint", run, *data, "--train-images", 0], ["--train-images"]),
    }


def named_classes(split: str, names: str) -> Path:
    """A copy of the labelled images with a converter's note of class names beside it."""
    path = FOLDER / f"named_{split}.beton"
    shutil.copy(train_beton(), path)
    Path(f"{path}.json").write_text(json.dumps({"class_names": names.split()}))
    return path


@once
def overflowing_run() -> Path:
    folder = FOLDER / "probe_nan"
    shutil.copytree(trained().folder, folder)
    (checkpoint,) = folder.glob("checkpoints/step_000000002")
    opened = open_checkpoint(checkpoint)
    (file,), slices = opened.files, {}
    for kind, extents in file.extents.items():
        slices[kind] = {name: (first, file.read(kind, name)) for name, (first, _) in extents.items()}
    for _, values in slices["target"].values():
        values[0] = 3e38  # finite, as a checkpoint's weights must be; what is computed from it is not
    contents = Contents(step=2, rank=0, processes=1, layout="zero", adam_steps=file.adam_steps, slices={})
    record = write_rank_file(file.path, slices, contents)
    state = opened.state.model_copy(update={"files": {file.path.name: record}})
    (checkpoint / "state.json").write_bytes(state_json(state))
    return folder


CASES = """no labels; no validation; missing run; no run; no checkpoint; config garbage; config empty; missing data;
weights without config; weights of another size; no weights; no seed; no images; no preset; no such label; no count;
not a dense folder;
not a size; other classes; a class only in validation; broken run; broken run, augmented"""


@pytest.mark.parametrize("case", re.split(r";\s", CASES))
def test_a_mistake_is_one_sentence(case: str) -> None:
    test_a_file_of_weights_gives_the_same_numbers_once()
    arguments, says = all_refusals()[case]
    code, output = evaluate(*arguments)
    assert code == 2, output
    error = output[output.index("error:") :].strip()
    assert output.count("error:") == 1 and "Traceback" not in output, output
    assert all(line.startswith("  - ") for line in error.splitlines()[1:]), output  # several problems of one file
    for text in says:
        assert text in error


test_a_file_of_weights_gives_the_same_numbers_once = once(test_a_file_of_weights_gives_the_same_numbers)
all_refusals = once(refusals)
