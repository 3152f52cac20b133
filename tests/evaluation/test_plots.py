"""The pictures: each is written, and what is drawn is what the results say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.plots import (
    Neighbours,
    Regression,
    confusion_figure,
    draw_results,
    grid_figure,
    neighbours_figure,
    regression_figure,
)


def task_of(name: str = "linear", label: str = "count", **changes) -> dict:
    grid = [
        {"features": features, "norm": norm, "lr": lr, "weight_decay": decay, "value": 50 + 10 * lr - 100 * decay}
        for features in ("last", "last4") for norm in ("none", "bn")
        for lr in (0.01, 0.05, 0.001) for decay in (0, 5e-4)
    ]  # fmt: skip
    return {
        "task": name, "label": label, "metric": "accuracy", "unit": "%", "value": 71.2, "grid": grid,
        "baselines": {"random": {"values": [20.0, 24.0]}, "pixels": {"values": [31.5]}}, "extra": {},
        "confusion": [[8, 2, 0], [1, 9, 0], [0, 0, 0]],
    } | changes  # fmt: skip


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_every_picture_of_the_results_is_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 7, 8, 8, 3), np.uint8)
    tasks = [task_of(), task_of(), task_of("transfer", "../a b/ü"), task_of("knn", "label", grid=[], confusion=None)]
    results = {"source": "runs/x at step 100", "tasks": tasks}
    regression = Regression("depth", np.arange(10.0), np.arange(10.0) + 1)
    neighbours = Neighbours(images[:, 0], [3, 4], images[:, 1:], [[3, 3, 4, 5, 6, 7]] * 2)
    paths = draw_results(results, tmp_path / "new" / "plots", neighbours=neighbours, regression=regression)
    names = sorted(path.name for path in paths)
    assert names == sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) and len(names) == 9
    assert "grid_linear_count.png" in names and "grid_linear_count_2.png" in names
    assert "grid_transfer_.._a_b_ü.png" in names and "baselines.png" in names and "regression_depth.png" in names
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 10, path.name


def test_the_grid_has_each_head_in_its_cell_and_outlines_the_best():
    figure = grid_figure(task_of())
    axes = figure.axes[:4]
    assert [axis.get_title() for axis in axes] == ["last + bn", "last + none", "last4 + bn", "last4 + none"]
    cells = np.asarray(axes[0].images[0].get_array())
    np.testing.assert_allclose(cells, 50 + 10 * np.array([[0.001], [0.01], [0.05]]) - 100 * np.array([[0, 5e-4]]))
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["0.001", "0.01", "0.05"]
    assert [len(axis.patches) for axis in axes] == [1, 1, 1, 1]  # they tie
    assert [patch.get_xy() for patch in axes[0].patches] == [(-0.5, 1.5)] and "50.50" in texts(axes[0])


def test_a_grid_with_holes_and_diverged_heads_is_drawn():
    grid = [
        {"lr": 0.1, "weight_decay": 0.1, "value": None},
        {"lr": 0.1, "weight_decay": 0.2, "value": float("nan")},
        {"lr": 0.2, "weight_decay": 0.2, "value": 40.0},
    ]
    axis = grid_figure(task_of(grid=grid)).axes[0]
    assert axis.get_title() == "all heads" and texts(axis) == ["-", "-", "-", "40.00"]


def test_confusion_is_in_percent_of_the_true_class():
    figure = confusion_figure(task_of(extra={"class_names": ["three", "four", "five"]}))
    axis = figure.axes[0]
    share = np.asarray(axis.images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(share[:2], [[80, 20, 0], [10, 90, 0]])
    assert np.isnan(share[2]).all() and texts(axis) == ["80", "20", "0", "10", "90", "0", "", "", ""]
    assert "20 images, 85.0 % correct" in axis.get_title()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["three", "four", "five"]
    many = confusion_figure(task_of(confusion=np.eye(300, dtype=int).tolist())).axes[0]
    assert texts(many) == []


@pytest.mark.parametrize("num_images", [50, 5000])
def test_regression_says_its_error_and_shows_the_diagonal(num_images):
    draw = np.random.default_rng(0)
    true = draw.uniform(5, 13, num_images)
    predicted = true + draw.choice([-0.5, 0.5], num_images)
    predicted[0] = np.nan
    axis = regression_figure(Regression("depth", true, predicted)).axes[0]
    assert axis.get_title() == f"depth: mean absolute error 0.5, {num_images - 1:,} images"
    line = axis.lines[0].get_xydata()
    assert (line[:, 0] == line[:, 1]).all() and axis.get_xlim() == axis.get_ylim() == tuple(line[:, 0])
    assert "nothing" in regression_figure(Regression("depth", [np.nan], [1.0])).axes[0].get_title()
    regression_figure(Regression("depth", [2.0], [2.0]))


def test_neighbours_stand_beside_their_query():
    images = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    figure = neighbours_figure(
        Neighbours(images[:, 0], ["cat", "dog"], images[:, 1:], [["cat", "dog"], ["dog", "ant"]])
    )
    rows = [figure.axes[:3], figure.axes[3:6]]
    assert [axis.get_xlabel() for axis in rows[0]] == ["cat", "cat", "dog ✗"]
    assert [axis.get_xlabel() for axis in rows[1]] == ["dog", "dog", "ant ✗"]
    np.testing.assert_array_equal(rows[1][2].images[0].get_array(), images[1, 2])
    assert [axis.get_title() for axis in rows[0]] == ["query", "nearest 1", "nearest 2"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*baselines.png|cannot write .*grid"):
        draw_results({"source": "", "tasks": [task_of()]}, tmp_path / "file")
