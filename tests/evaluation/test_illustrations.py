"""Pictures of an evaluation: they show the neighbours that were found, and no failure of theirs loses a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_runs import tiny_config

from ijepa_ds.config import parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.evaluation import plots
from ijepa_ds.evaluation.command import build_parser
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.illustrations import illustrate
from ijepa_ds.evaluation.results import Baseline, Results, TaskResult
from ijepa_ds.evaluation.setting import Setting


@pytest.fixture(scope="module")
def setting(make_beton: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    labels = {"label": [k % 3 for k in range(12)]}
    path = make_beton(tmp_path_factory.mktemp("pictures") / "a.beton", 12, (16, 16), labels, write_mode="raw")
    process = Process(0, 1, torch.device("cpu"))
    arguments = ["--checkpoint", "x", "--train-images", "6", "--micro-batch", "5"]
    options = build_parser().parse_args([*arguments, "--train", str(path), "--validation", str(path)])
    config = parse_config(tiny_config(ijepa__data__image_size=16))
    return Setting(options, config, LabelledData(options, config, process), process)


def task(name: str, label: str, **more: Any) -> TaskResult:
    baselines: dict[str, Baseline] = {name: {"values": [30.0]} for name in ("random", "pixels")}
    sizes = {"train_images": 6, "validation_images": 12}
    return TaskResult(task=name, label=label, value=40.0, grid=[], best_head={}, baselines=baselines, **sizes, **more)


def results() -> Results:
    nearest = [{"query": query, "train": [2, 6, 10, 0, 4, 8]} for query in (0, 5, 5)]
    pairs = {"true_values": [1.0, 2.0], "predicted_values": [1.5, 1.5]}
    tasks = [task("knn", "label", extra={"neighbours": nearest})]
    tasks.append(task("depth", "depth", extra=pairs, confusion=[[1, 0], [1, 1]]))
    return Results("a run", "target", None, {}, {}, {}, tasks)


def test_neighbours_are_shown_with_their_images_and_classes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    draw = plots.neighbours_figure
    monkeypatch.setattr(plots, "neighbours_figure", lambda rows: shown.extend(rows) or draw(rows))
    paths = illustrate(results(), tmp_path, setting, step=3)
    names = {path.name for path in paths}
    assert names == {"confusion_depth_depth.png", "baselines.png", "regression_depth.png", "neighbours.png"}
    line = capsys.readouterr().out
    assert all(name in line for name in names) and "warning" not in line
    images = torch.cat(
        [i.clone() for i in setting.data.loader("validation", crop_share=1.0).batches(np.arange(12))]
    ).numpy()
    samples = [0, 2, 6, 10, 0, 4, 8], [5, 2, 6, 10, 0, 4, 8]
    for row, pictured in zip(shown, samples, strict=True):
        assert np.array_equal([image for image, _ in row], images[pictured])
        assert [label for _, label in row] == [str(sample % 3) for sample in pictured]
    assert list((tmp_path / "tensorboard" / "trained").iterdir())


def test_a_picture_that_fails_is_a_line_and_the_others_are_drawn(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **options: object) -> None:
        raise ZeroDivisionError("no bins")

    monkeypatch.setattr(plots, "confusion_figure", fail)
    paths = illustrate(results(), tmp_path, setting, step=3)
    assert {path.name for path in paths} == {"baselines.png", "regression_depth.png", "neighbours.png"}
    assert "warning: the picture confusion_depth_depth.png is missing: no bins" in capsys.readouterr().out
    monkeypatch.setattr(setting.data, "loader", fail)
    paths = illustrate(results(), tmp_path, setting, step=3)
    assert {path.name for path in paths} == {"baselines.png", "regression_depth.png"}
    assert "warning: the picture neighbours.png is missing: no bins" in capsys.readouterr().out
    monkeypatch.setattr(plots, "draw_results", fail)
    assert illustrate(results(), tmp_path, setting, step=3) == []
    assert "warning: pictures are missing" in capsys.readouterr().out
