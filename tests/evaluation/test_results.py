"""results.json there and back, the table, and that nothing is reported without its baselines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.results import (
    Measurement,
    Results,
    best_of,
    combine,
    format_table,
    margin,
    random_values,
    read_results,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "results"


def measurement(*values: float, error: float = 1.0, names: tuple[str, ...] = ("last", "last4")) -> Measurement:
    grid = [{"features": name, "lr": 0.1, "value": value} for name, value in zip(names, values, strict=True)]
    extra = {"mean_absolute_error": error, "batch": 5}
    return Measurement(
        task="depth",
        label="depth",
        grid=grid,
        train_images=10,
        validation_images=5,
        seconds=1.5,
        extra=extra,
    )


def everything() -> dict[str, list[Measurement]]:
    return {
        "trained": [measurement(50.0, 60.0)],
        "random": [measurement(30.0, 40.0, error=2.0), measurement(34.0, 36.0, error=3.0)],
        "pixels": [measurement(20.0, names=("pixels",))],
    }


def results(**changes: Any) -> Results:
    whole = Results("a run", "target", None, {"torch": "2"}, {"a": [1]}, {"task": ["depth"]}, combine(everything()))
    return dataclasses.replace(whole, **changes)


def test_the_best_head_is_reported_for_the_baselines_too() -> None:
    (result,) = combine(everything())
    assert result.value == 60.0 and result.best_head == {"features": "last4", "lr": 0.1}
    assert (result.task, result.train_images, result.seconds, result.unit) == ("depth", 10, 1.5, "%")
    random, pixels = result.baselines["random"], result.baselines["pixels"]
    assert random["values"] == [40.0, 36.0] and random_values(result, "last") == [30.0, 34.0]
    assert random["mean_absolute_error"] == [2.0, 3.0] and "batch" not in random
    assert pixels["values"] == [20.0] and result.extra["batch"] == 5
    assert result.baseline("random") == (38.0, pytest.approx(8**0.5)) and result.baseline("pixels") == (20.0, None)
    assert best_of(result.grid, "last")["value"] == 50.0
    points, deviations = margin(50.0, [30.0, 34.0])
    assert points == 18.0 and deviations == pytest.approx(18 / 8**0.5) and margin(50.0, [30.0]) == (20.0, None)


@pytest.mark.parametrize("missing", ["random", "pixels"])
def test_a_result_without_a_baseline_is_none(missing: str) -> None:
    with pytest.raises(AssertionError, match=f"has no baseline '{missing}'"):
        combine({name: measured for name, measured in everything().items() if name != missing})


def test_the_table_has_a_row_for_each_kind_of_features() -> None:
    table, notes = format_table(combine(everything())).strip().split("\n\n")
    lines = table.splitlines()[1:]
    assert "* is reported" in notes and "random: mean" in notes and "draws" not in notes
    assert [line.split()[:3] for line in lines] == [["depth", "depth", "last"], ["depth", "depth", "last4*"]]
    assert "50.00 %" in lines[0] and "32.00 ± 2.83 %" in lines[0] and "20.00 %" in lines[0]
    assert "+18.0 points = +6.4 sd" in lines[0] and lines[0].endswith("lr 0.1")
    single = combine({name: measured[:1] for name, measured in everything().items()})
    assert "+20.0 points  " in format_table(single) and "±" not in format_table(single)


def test_what_was_measured_over_draws_is_a_mean_with_its_deviation() -> None:
    measured = everything()
    for depth in itertools.chain(*measured.values()):
        depth.grid[0] |= {"method": "logistic", "values": [1.0, 2.0], "deviation": 1.25}
    (result,) = combine(measured)
    lines = format_table([result]).splitlines()
    assert "50.00 ± 1.25 %" in lines[2] and lines[2].endswith("lr 0.1 method logistic")
    assert lines[-1].startswith("lowshot, trained: mean ± deviation over the draws")
    assert len({line.index("%") for line in lines[2:4]}) == 1, "columns are in line"


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    results().write(path)
    saved = json.loads(path.read_text())
    assert read_results(path) == results() and saved["schema"] == 1
    assert set(saved["tasks"][0]) == {
        *("task", "label", "metric", "unit", "value", "best_head", "grid", "baselines", "extra", "confusion"),
        *("train_images", "validation_images", "seconds", "images_per_second"),
    }
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    path.write_text(json.dumps({**saved, "written_by": "another version"}))
    assert read_results(path) == results()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*seed*.json")), ids=lambda path: path.stem)
def test_older_files_are_read(path: Path) -> None:
    saved = json.loads(path.read_text())
    read = read_results(path)
    assert [(task.task, task.value) for task in read.tasks] == [(t["task"], t["value"]) for t in saved["tasks"]]
    assert dataclasses.asdict(read) == saved and len(format_table(read.tasks).splitlines()) > len(read.tasks)


TASK = dataclasses.asdict(results().tasks[0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("\xff\xfe\x00", "byte 0 is not UTF-8"),
        ("[" * 5000 + "]" * 5000, "lists and objects lie within one another"),
        ({"tasks": 10**500}, "a number has 501 digits"),
        ("[]", "Input should be an object"),
        ({"schema": 7, "tasks": 3}, "schema: Input should be 1"),
        ({"tasks": []}, "tasks: List should have at least 1 item"),
        ({"tasks": [3]}, "tasks.0: Input should be an object"),
        ({"tasks": [{**TASK, "value": "60"}]}, "tasks.0.value: Input should be a valid number"),
        ({"tasks": [{**TASK, "value": True}]}, "tasks.0.value: Input should be a valid number"),
        ({"tasks": [{key: TASK[key] for key in TASK if key != "label"}]}, "tasks.0.label: Field required"),
        ({"tasks": [{**TASK, "baselines": None}]}, "tasks.0.baselines: Input should be an object"),
        ({"tasks": [{**TASK, "baselines": {"random": [3.0]}}]}, "tasks.0.baselines.random: Input should be an object"),
        ({"options": [3]}, "options: Input should be an object"),
    ],
)
def test_files_of_another_kind_are_refused_in_one_sentence(
    tmp_path: Path, content: str | dict[str, Any], reason: str
) -> None:
    path = tmp_path / "results.json"
    whole = dataclasses.asdict(results())
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content), encoding="latin-1")
    sentence = rf"results.json is not the results of an evaluation \({reason}.*make it with: python -m ijepa_ds evalua"
    with pytest.raises(UserError, match=sentence) as error:
        read_results(path)
    assert "\n" not in str(error.value)


def test_a_head_that_diverged_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    whole = dataclasses.asdict(results())
    whole["tasks"][0]["grid"][0]["value"] = math.nan
    path.write_text(json.dumps(whole))
    assert math.isnan(read_results(path).tasks[0].grid[0]["value"])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}/none.json .*No such file.*python -m ijepa_ds"):
        read_results(tmp_path / "none.json")


def test_confusion_counts_images_by_true_class_then_prediction() -> None:
    classes = Classes(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1, 1]), ["a", "b"])
    assert classes.confusion(torch.tensor([0, 1, 1, 1, 0])) == [[1, 1], [1, 2]]
    many = Classes(classes.train, classes.validation, [str(k) for k in range(101)])
    assert many.confusion(classes.validation) is None


def test_of_errors_the_least_is_the_best() -> None:
    def depth(*values: float, names: tuple[str, ...] = ("last", "last4")) -> Measurement:
        changes = {"metric": "RMSE", "unit": "", "extra": {"position_alone": 1.5}}
        return dataclasses.replace(measurement(*values, names=names), **changes)

    pixels = depth(4.0, 3.5, names=("pixels", "pixels"))
    (result,) = combine(
        {"trained": [depth(0.8, 0.7)], "random": [depth(0.9, 1.1), depth(1.3, 1.0)], "pixels": [pixels]}
    )
    assert result.lower_is_better and (result.value, result.best_head["features"]) == (0.7, "last4")
    assert result.baselines["random"]["values"] == [0.9, 1.0] and result.baselines["pixels"]["values"] == [3.5]
    assert random_values(result, "last4") == [1.1, 1.0]
    table = format_table([result])
    assert "0.700 1.050 ± 0.071 3.500 -0.350 = -4.9 sd" in " ".join(table.split()) and "%" not in table
    assert "depth: a patch's position alone, without the image, gives 1.500" in table and "less is better" in table
