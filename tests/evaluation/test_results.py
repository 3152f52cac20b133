"""results.json there and back, the table, and that nothing is reported without its baselines."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Encoder, small_pixels
from ijepa_ds.evaluation.labels import Classes, confusion_matrix
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


def encoder(name: str, seed: int = 0) -> Encoder:
    return Encoder(name, seed, 3, {}, small_pixels)


def measurement(*values: float, error: float = 1.0, names: tuple[str, ...] = ("last", "last4")) -> Measurement:
    grid = [{"features": name, "lr": 0.1, "value": value} for name, value in zip(names, values, strict=True)]
    extra = {"mean_absolute_error": error, "batch": 5}
    return Measurement("depth", "depth", grid, 10, 5, 1.5, extra=extra, compared=("mean_absolute_error",))


def everything() -> list[tuple[Encoder, list[Measurement]]]:
    return [
        (encoder("trained"), [measurement(50.0, 60.0)]),
        (encoder("random", 0), [measurement(30.0, 40.0, error=2.0)]),
        (encoder("random", 1), [measurement(34.0, 36.0, error=3.0)]),
        (encoder("pixels"), [measurement(20.0, names=("pixels",))]),
    ]


def test_the_best_head_is_reported_for_the_baselines_too():
    (result,) = combine(everything())
    assert result.value == 60.0 and result.best_head == {"features": "last4", "lr": 0.1}
    assert result.baselines["random"]["values"] == [40.0, 36.0] and random_values(result, "last") == [30.0, 34.0]
    assert result.baselines["random"]["mean_absolute_error"] == [2.0, 3.0] and "batch" not in result.baselines["random"]
    assert result.baselines["pixels"]["values"] == [20.0] and result.extra["batch"] == 5
    assert best_of(result.grid, "last")["value"] == 50.0 and best_of(result.grid, "none") is None
    points, deviations = margin(50.0, [30.0, 34.0])
    assert points == 18.0 and deviations == pytest.approx(18 / 8**0.5) and margin(50.0, [30.0]) == (20.0, None)


@pytest.mark.parametrize("missing", ["random", "pixels"])
def test_a_result_without_a_baseline_is_none(missing):
    with pytest.raises(AssertionError, match=f"has no baseline '{missing}'"):
        combine([(one, found) for one, found in everything() if one.name != missing])


def test_the_table_has_a_row_for_each_kind_of_features():
    table, notes = format_table(combine(everything())).strip().split("\n\n")
    lines = table.splitlines()[1:]
    assert "* is reported" in notes and "random: mean" in notes and "draws" not in notes
    assert [line.split()[:3] for line in lines] == [["depth", "depth", "last"], ["depth", "depth", "last4*"]]
    assert "50.00 %" in lines[0] and "32.00 ± 2.83 %" in lines[0] and "20.00 %" in lines[0]
    assert "+18.0 points = +6.4 sd" in lines[0] and lines[0].endswith("lr 0.1")
    single = combine([everything()[place] for place in (0, 1, 3)])
    assert "+20.0 points  " in format_table(single) and "±" not in format_table(single)


def test_what_was_measured_over_draws_is_a_mean_with_its_deviation():
    found = everything()
    for _, (one,) in found:
        one.grid[0] |= {"method": "logistic", "values": [1.0, 2.0], "deviation": 1.25}
    (result,) = combine(found)
    lines = format_table([result]).splitlines()
    assert "50.00 ± 1.25 %" in lines[2] and lines[2].endswith("lr 0.1 method logistic")
    assert lines[-1].startswith("lowshot, trained: mean ± deviation over the draws")
    assert len({line.index("%") for line in lines[2:4]}) == 1, "columns are in line"


def test_the_file_gives_back_what_was_written(tmp_path):
    results = Results("a run", "target", None, {"torch": "2"}, {"a": [1]}, {"task": ["depth"]}, combine(everything()))
    path = tmp_path / "deep" / "results.json"
    results.write(path)
    assert read_results(path) == results and json.loads(path.read_text())["schema"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_files_of_another_kind_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "results.json"
    results = dataclasses.asdict(Results("a run", "target", None, {}, {}, {}, []))
    for content, said in (
        ("{", "is not the results"),
        ("[]", "is not the results"),
        (json.dumps({**results, "schema": 7}), "has schema 7, this version reads 1"),
        (json.dumps({**results, "scores": []}), "is not the results"),
        (json.dumps({**results, "tasks": [{"task": "knn"}]}), "is not the results"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            read_results(path)
    with pytest.raises(UserError, match="python -m ijepa_ds evaluate"):
        read_results(tmp_path / "none.json")


def test_confusion_counts_images_by_true_class_then_prediction():
    classes = Classes(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1, 1]), ["a", "b"])
    assert confusion_matrix(classes, torch.tensor([0, 1, 1, 1, 0])) == [[1, 1], [1, 2]]
    many = Classes(classes.train, classes.validation, [str(k) for k in range(101)])
    assert confusion_matrix(many, classes.validation) is None
