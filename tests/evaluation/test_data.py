"""The labelled images of an evaluation: which are used, how they are cropped, and whose classes they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_runs import tiny_config

from ijepa_ds.config import parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import PIXELS, Candidate, small_pixels
from ijepa_ds.evaluation.command import build_parser
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.setting import Setting

PROCESS = Process(0, 1, torch.device("cpu"))


def options_of(*arguments: object) -> argparse.Namespace:
    return build_parser().parse_args(["--checkpoint", "x", "--micro-batch", "5", *map(str, arguments)])


def open_data(train: Path, validation: Path, *arguments: object, size: int = 16) -> LabelledData:
    config = parse_config(tiny_config(ijepa__data__image_size=size))
    return LabelledData(options_of("--train", train, "--validation", validation, *arguments), config, PROCESS)


def setting_of(data: LabelledData) -> Setting:
    return Setting(options_of(), parse_config(tiny_config()), data, PROCESS)


def note(path: Path, **content) -> None:
    Path(f"{path}.json").write_text(json.dumps(content))


def pixels() -> Candidate:
    return Candidate("pixels", 0, {"pixels": slice(None)}, small_pixels)


def test_labels_and_features_are_of_the_same_samples(make_beton, tmp_path):
    labels = {"label": [k % 3 for k in range(12)], "distance": [k / 4 for k in range(12)]}
    path = make_beton(tmp_path / "a.beton", 12, (16, 16), labels, write_mode="raw")
    whole, few = open_data(path, path), open_data(path, path, "--train-images", 4)
    assert whole.fields == ["label", "distance"] and whole.integer_fields == ["label"]
    train, validation = few.labels("label")
    assert train.tolist() == [0, 0, 0, 0] and validation.tolist() == labels["label"]  # samples 0, 3, 6, 9
    assert few.labels("distance")[0].tolist() == [0.0, 0.75, 1.5, 2.25]
    all_rows, rows, anew = (setting_of(data).features(pixels(), "train") for data in (whole, few, whole))
    assert torch.equal(rows, all_rows[::3]) and torch.equal(anew, all_rows)
    with pytest.raises(UserError, match=r"no label field 'size' in common \(they have: label, distance\)"):
        whole.labels("size")


def test_features_of_a_candidate_are_made_once(make_beton, tmp_path):
    path = make_beton(tmp_path / "a.beton", 12, (16, 16), {"label": [0, 1] * 6}, write_mode="raw")
    setting, candidate = setting_of(open_data(path, path)), pixels()
    rows = setting.features(candidate, "train")
    mirrored = setting.features(candidate, "train", mirrored=True).view(12, 3, PIXELS, PIXELS)
    torch.testing.assert_close(mirrored, rows.view(12, 3, PIXELS, PIXELS).flip(3))
    assert setting.features(candidate, "train") is rows
    positions = np.array([1, 7])
    assert torch.equal(setting.features(candidate, "train", positions=positions), rows[positions])
    assert torch.equal(setting.features(candidate, "validation", positions=positions), rows[positions])
    assert setting.features(pixels(), "train") is not rows  # of another candidate: anew


def test_labels_that_are_no_numbers_are_refused(make_beton, tmp_path):
    path = make_beton(tmp_path / "a.beton", 4, (16, 16), {"depth": [0.0, float("nan"), 2.0, float("inf")]})
    with pytest.raises(UserError, match=r"'depth' is no number for 2 of 4 images of .*a\.beton: convert anew"):
        open_data(path, path).labels("depth")


def test_the_central_crop_leaves_images_whole_that_are_no_larger_than_the_input(make_beton, tmp_path):
    path = make_beton(tmp_path / "a.beton", 6, (20, 30), {"label": [0, 1] * 3})
    assert open_data(path, path, size=16).crop_share() == 0.875
    assert open_data(path, path, size=20).crop_share() == open_data(path, path, size=32).crop_share() == 1.0


def test_clevr_is_told_from_scenes_like_it(make_beton, tmp_path):
    wide = make_beton(tmp_path / "wide.beton", 4, (32, 48), {"depth": [1.0, 2.0, 3.0, 4.0]})
    square = make_beton(tmp_path / "square.beton", 4, (32, 32), {"depth": [1.0, 2.0, 3.0, 4.0]})
    assert not open_data(wide, wide).is_clevr()  # nothing says so
    for path in (wide, square):
        note(path, kind="CLEVR scenes, split train")
    assert open_data(wide, wide).is_clevr() and not open_data(square, square).is_clevr()


def test_classes_that_differ_are_named(make_beton, tmp_path):
    paths = [make_beton(tmp_path / f"{name}.beton", 4, (16, 16), {"label": [0, 1] * 2}) for name in "ab"]
    note(paths[0], class_names=["ant", "bee"])
    assert open_data(*paths).class_names == ["ant", "bee"]  # the other file has no note
    note(paths[1], class_names=["ant", "cat"])
    with pytest.raises(UserError, match=r"not the same: only .*a\.beton has bee, only .*b\.beton has cat; convert"):
        open_data(*paths)
    note(paths[1], class_names=["bee", "ant"])
    with pytest.raises(UserError, match="their order differs"):
        open_data(*paths)
    Path(f"{paths[1]}.json").write_text("no JSON")
    with pytest.raises(UserError, match=r"b\.beton\.json cannot be read"):
        open_data(*paths)


def test_a_folder_is_refused_with_the_command_that_converts_it(make_beton, tmp_path):
    one = make_beton(tmp_path / "one.beton", 4, (16, 16), {"label": [0, 1] * 2})
    with pytest.raises(UserError, match=f"python data_prep/to_ffcv.py {tmp_path} {tmp_path}.beton"):
        open_data(one, tmp_path)


def test_files_without_a_common_label_are_refused(make_beton, tmp_path):
    one = make_beton(tmp_path / "one.beton", 4, (16, 16), {"label": [0, 1] * 2})
    other = make_beton(tmp_path / "other.beton", 4, (16, 16), {"count": [0, 1] * 2})
    with pytest.raises(UserError, match="share no label field"):
        open_data(one, other)
