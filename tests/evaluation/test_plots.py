"""The pictures: each is written, and what is drawn is what the results say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from PIL import Image

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.plots import (
    bar_figure,
    baseline_figure,
    confusion_figure,
    draw_results,
    grid_figure,
    neighbours_figure,
    regression_figure,
    save,
)
from ijepa_ds.evaluation.results import Results, TaskResult


def task_of(name: str = "linear", label: str = "count", **changes: Any) -> TaskResult:
    grid = [
        {"features": features, "norm": norm, "lr": lr, "weight_decay": decay, "value": 50 + 10 * lr - 100 * decay}
        for features in ("last", "last4") for norm in ("none", "bn")
        for lr in (0.01, 0.05, 0.001) for decay in (0, 5e-4)
    ]  # fmt: skip
    whole = {
        "train_images": 10, "validation_images": 20, "value": 71.2, "grid": grid, "best_head": {}, "extra": {},
        "baselines": {"random": {"values": [20.0, 24.0]}, "pixels": {"values": [31.5]}},
        "confusion": [[8, 2, 0], [1, 9, 0], [0, 0, 0]],
    }  # fmt: skip
    return TaskResult(task=name, label=label, **(whole | changes))


def results_of(*tasks: TaskResult) -> Results:
    return Results("runs/x at step 100", "target", None, {}, {}, {}, list(tasks))


def pairs(true: np.ndarray, predicted: np.ndarray) -> TaskResult:
    return task_of("depth", "depth", extra={"true_values": true.tolist(), "predicted_values": predicted.tolist()})


def texts(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_every_picture_of_the_results_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 7, 8, 8, 3), np.uint8)
    predicted = {"true_values": list(range(10)), "predicted_values": list(range(1, 11))}
    depth = task_of("logistic", "depth", grid=[], confusion=None, extra=predicted)
    knn = task_of("knn", "label", grid=[], confusion=None)
    results = results_of(task_of(), task_of(), task_of("transfer", "../a b/ü"), knn, depth)
    neighbours = [list(zip(row, label + "334567", strict=True)) for row, label in zip(images, "34", strict=True)]
    paths = draw_results(results, tmp_path / "new" / "plots", neighbours=lambda: neighbours)
    names = sorted(path.name for path in paths)
    assert names == sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) and len(names) == 9
    assert "grid_linear_count.png" in names and "grid_linear_count_2.png" in names
    assert "grid_transfer_.._a_b_ü.png" in names and "baselines.png" in names
    assert "regression_depth_logistic.png" in names and "warning" not in capsys.readouterr().out
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 10, path.name


def test_the_grid_has_each_head_in_its_cell_and_outlines_the_best() -> None:
    figure = grid_figure(task_of())
    axes = figure.axes[:4]
    assert [axis.get_title() for axis in axes] == ["last + bn", "last + none", "last4 + bn", "last4 + none"]
    cells = np.asarray(axes[0].images[0].get_array())
    np.testing.assert_allclose(cells, 50 + 10 * np.array([[0.001], [0.01], [0.05]]) - 100 * np.array([[0, 5e-4]]))
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["0.001", "0.01", "0.05"]
    assert [len(axis.patches) for axis in axes] == [1, 1, 1, 1]  # they tie
    assert [patch.get_xy() for patch in axes[0].patches] == [(-0.5, 1.5)] and "50.50" in texts(axes[0])


def test_a_grid_with_holes_and_diverged_heads_is_drawn() -> None:
    grid = [
        {"features": "last", "lr": 0.1, "weight_decay": 0.2, "value": float("nan")},
        {"features": "last", "lr": 0.2, "weight_decay": 0.2, "value": 40.0},
        {"features": "last", "lr": 0.2, "value": 30.0},
    ]
    axis = grid_figure(task_of(grid=grid)).axes[0]
    assert axis.get_title() == "last" and texts(axis) == ["-", "-", "30.0", "40.0"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "0.2"]


def test_confusion_is_in_percent_of_the_true_class() -> None:
    figure = confusion_figure(task_of(extra={"class_names": ["three", "four", "five"]}))
    axis = figure.axes[0]
    share = np.asarray(axis.images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(share[:2], [[80, 20, 0], [10, 90, 0]])
    assert np.isnan(share[2]).all() and texts(axis) == ["80", "20", "0", "10", "90", "0", "", "", ""]
    assert "20 images, 85.0 % correct" in axis.get_title()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["three", "four", "five"]
    many = confusion_figure(task_of(confusion=np.eye(300, dtype=int).tolist())).axes[0]
    assert texts(many) == []


def test_regression_says_its_error_and_shows_the_diagonal() -> None:
    draw = np.random.default_rng(0)
    true = draw.uniform(5, 13, 50)
    predicted = true + draw.choice([-0.5, 0.5], 50)
    predicted[0] = np.nan
    axis = regression_figure(pairs(true, predicted)).axes[0]
    assert axis.get_title() == "depth: mean absolute error 0.5, 49 images"
    line = np.asarray(axis.lines[0].get_xydata())
    assert (line[:, 0] == line[:, 1]).all() and axis.get_xlim() == axis.get_ylim() == tuple(line[:, 0])
    alone = regression_figure(pairs(np.array([2.0]), np.array([2.0]))).axes[0]
    assert alone.get_xlim() == (1.5, 2.5)


def test_bars_of_random_encoders_have_their_deviation() -> None:
    axis = baseline_figure(results_of(task_of(), task_of("knn", "label"))).axes[0]
    containers = [container for container in axis.containers if isinstance(container, BarContainer)]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in containers}
    assert heights == {"this encoder": [71.2] * 2, "random encoder": [22.0] * 2, "raw pixels": [31.5] * 2}
    (errors,) = [bars.errorbar for bars in containers if bars.errorbar is not None]
    ends = np.array([segment[:, 1] for segment in errors.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, [[22 - 8**0.5, 22 + 8**0.5]] * 2)
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["linear\ncount", "knn"]


def test_a_bar_that_is_missing_has_no_number() -> None:
    tasks = [task_of("a"), task_of("b")]
    axis = bar_figure(tasks, {"x": [1.25, None], "y": [3.0, 4.0]}, [], title="long " * 30).axes[0]
    assert [text for text in texts(axis) if text] == ["1.2", "3.0", "4.0"]
    assert axis.get_title().startswith("…") and len(axis.get_title()) < 90


def test_neighbours_stand_beside_their_query() -> None:
    images = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    labels = ["cat", "cat", "dog"], ["dog", "dog", "ant"]
    figure = neighbours_figure([list(zip(*row, strict=True)) for row in zip(images, labels, strict=True)])
    rows = [figure.axes[:3], figure.axes[3:6]]
    assert [axis.get_xlabel() for axis in rows[0]] == ["cat", "cat", "dog ✗"]
    assert [axis.get_xlabel() for axis in rows[1]] == ["dog", "dog", "ant ✗"]
    assert [axis.xaxis.label.get_color() for axis in rows[1]] == ["black", "#00684D", "#A34700"]
    np.testing.assert_array_equal(rows[1][2].images[0].get_array(), images[1, 2])
    assert [axis.get_title() for axis in rows[0]] == ["query", "nearest 1", "nearest 2"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*baselines.png"):
        save(baseline_figure(results_of(task_of())), tmp_path / "file" / "baselines.png")
    assert draw_results(results_of(task_of()), tmp_path / "file", neighbours=None) == []
    assert capsys.readouterr().out.count("is missing: cannot write") == 3


def test_errors_stand_on_an_axis_of_their_own() -> None:
    error = {"metric": "RMSE", "unit": "", "value": 0.875, "confusion": None}
    figure = baseline_figure(results_of(task_of("dense_knn", "depth", **error), task_of()))
    shares, errors = figure.axes
    assert (shares.get_ylabel(), errors.get_ylabel()) == ("%", "RMSE, less is better")
    bars = [[bar.get_height() for bar in axis.containers[0]] for axis in (shares, errors)]
    assert bars == [[71.2], [0.875]] and "0.88" in texts(errors) and len(figure.legends[0].get_texts()) == 3
    assert [label.get_text() for label in errors.get_xticklabels()] == ["dense_knn\ndepth"]


def test_a_confusion_of_pixels_says_so() -> None:
    figure = confusion_figure(task_of(extra={"counted": "pixels"}))
    assert "20 pixels, 85.0 % correct" in figure.axes[0].get_title()
