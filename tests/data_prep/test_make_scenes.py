"""The built-in scenes: seeded, visible and independent labels, honest perspective, an output that is all or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import make_scenes, scene_renderer
from data_prep.make_scenes import render_scene
from ijepa_ds.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "make_scenes.py"

SMALL = {"train": 5, "val": 3, "size": 32, "seed": 7, "workers": 1}


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    return [render_scene(1, "train", index, 32)[1] for index in range(1200)]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "small"
    make_scenes.make_scenes(out, **SMALL)
    return out


def nearest_depth(scene: dict) -> float:
    return min(entry["pixel_coords"][2] for entry in scene["objects"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_image_is_a_pure_function_of_its_key() -> None:
    image, scene = render_scene(3, "val", 5, 64)
    render_scene(9, "train", 1, 32)
    again, same_scene = render_scene(3, "val", 5, 64)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert np.array_equal(image, again) and scene == same_scene
    for other in ((4, "val", 5), (3, "train", 5), (3, "val", 6)):
        assert render_scene(*other, 64)[1]["objects"] != scene["objects"]


def test_every_size_shows_the_same_scene() -> None:
    for index in range(5):
        small, small_scene = render_scene(0, "train", index, 64)
        large, large_scene = render_scene(0, "train", index, 128)
        shrunk = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(float) - small).mean() < 4.0
        for a, b in zip(small_scene["objects"], large_scene["objects"], strict=True):
            assert a["3d_coords"] == b["3d_coords"] and a["pixel_coords"][2] == b["pixel_coords"][2]
            assert np.allclose(np.multiply(a["pixel_coords"][:2], 2), b["pixel_coords"][:2], atol=1e-3)


def test_labels_vary_and_are_independent(scenes: list[dict]) -> None:
    counts = np.array([len(scene["objects"]) for scene in scenes])
    depths = np.array([nearest_depth(scene) for scene in scenes])
    assert set(counts) == set(range(3, 11))
    assert np.bincount(counts)[3:].min() > 0.6 * len(scenes) / 8
    assert depths.min() < 5.3 and depths.max() > 12.7 and 2.0 < depths.std() < 2.7  # uniform from 5 to 13: 2.31
    assert abs(np.corrcoef(counts, depths)[0, 1]) < 0.08
    assert {entry["shape"] for scene in scenes for entry in scene["objects"]} == set(scene_renderer.SHAPES)
    assert {texture for scene in scenes for texture in scene["textures"]} == set(scene_renderer.TEXTURES)


def test_apparent_size_alone_does_not_give_the_depth(scenes: list[dict]) -> None:
    entries = [entry for scene in scenes for entry in scene["objects"]]
    sizes = np.array([entry["size"] for entry in entries])
    depths = np.array([entry["pixel_coords"][2] for entry in entries])
    assert sizes.max() > 1.75 * sizes.min()
    assert np.corrcoef(sizes / depths, 1.0 / depths)[0, 1] < 0.9


def test_every_object_can_be_seen(scenes: list[dict]) -> None:
    for scene in scenes:
        for entry in scene["objects"]:
            x, y, depth = entry["pixel_coords"]
            assert 0.0 < x < 32.0 and 0.0 < y < 32.0 and 5.0 <= depth <= 18.0
            assert 0.5 <= entry["visible"] <= 1.0


def test_the_nearest_object_is_hidden_by_none(scenes: list[dict]) -> None:
    """Only the frame may cut a part of it off, so where it is well inside the frame it is whole."""
    for scene in scenes:
        entry = min(scene["objects"], key=lambda entry: entry["pixel_coords"][2])
        x, y, depth = entry["pixel_coords"]
        margin = 16.0 * 2.2 * entry["size"] / (0.53 * (depth - 1.75 * entry["size"]))
        if margin < x < 32.0 - margin and margin < y < 32.0 - margin:
            assert entry["visible"] > 0.95, (scene["image_index"], entry)


def test_the_layout_is_that_of_clevr(small_set: Path) -> None:
    for split, total in (("train", 5), ("val", 3)):
        document = json.loads((small_set / "scenes" / f"CLEVR_{split}_scenes.json").read_text())
        assert document["info"]["seed"] == 7 and document["info"]["size"] == 32 and document["info"]["split"] == split
        assert [scene["image_index"] for scene in document["scenes"]] == list(range(total))
        for scene in document["scenes"]:
            expected, expected_scene = render_scene(7, split, scene["image_index"], 32)
            assert scene == expected_scene
            path = small_set / "images" / split / scene["image_filename"]
            assert np.array_equal(cv2.imread(str(path))[..., ::-1], expected)


def test_dense_truth_stands_beside_the_same_images(small_set: Path, tmp_path: Path) -> None:
    make_scenes.make_scenes(tmp_path / "dense", **SMALL, dense=True)
    dense, plain = files_of(tmp_path / "dense"), files_of(small_set)
    images = {name for name in plain if name.startswith("images/")}
    assert {name: dense[name] for name in images} == {name: plain[name] for name in images}
    assert (tmp_path / "dense" / "classes.txt").read_text().split() == list(make_scenes.CLASSES)
    for name in images:
        mask, depth = (
            cv2.imread(str(tmp_path / "dense" / name.replace("images", kind)), cv2.IMREAD_UNCHANGED)
            for kind in ("masks", "depth")
        )
        split, index = name.split("/")[1], int(name[-10:-4])
        objects = render_scene(7, split, index, 32)[1]["objects"]
        assert (mask.dtype, depth.dtype, mask.shape, depth.shape) == (np.uint8, np.uint16, (32, 32), (32, 32))
        shapes = {make_scenes.CLASSES[k] for k in np.unique(mask)} - {"ground", "wall"}
        assert shapes == {entry["shape"] for entry in objects}
        # The nearest point of the nearest object is before its centre, by no more than the largest bound of a shape.
        nearest = min(entry["pixel_coords"][2] for entry in objects)
        assert nearest - 1.75 * 1.5 < depth[mask >= 2].min() / 1000 < nearest
    with pytest.raises(UserError, match=r'not.*"dense": true'):
        make_scenes.make_scenes(small_set, **SMALL, dense=True)


def test_workers_change_nothing_and_a_bigger_set_begins_with_the_smaller(small_set: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    make_scenes.make_scenes(two, **(SMALL | {"workers": 2}))
    assert files_of(two) == files_of(small_set)
    bigger = tmp_path / "bigger"
    make_scenes.make_scenes(bigger, **(SMALL | {"train": 120, "workers": 2}))  # two jobs
    images = files_of(bigger / "images")
    assert len(images) == 123 and files_of(small_set / "images").items() <= images.items()
    scenes = [
        json.loads((path / "scenes/CLEVR_train_scenes.json").read_text())["scenes"] for path in (small_set, bigger)
    ]
    assert len(scenes[1]) == 120 and scenes[1][:5] == scenes[0]


def test_a_finished_folder_is_reused_or_refused(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    make_scenes.make_scenes(small_set, **(SMALL | {"workers": 2}))
    assert "reused" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'"seed": 7.*"seed": 8.*another OUT or delete it'):
        make_scenes.make_scenes(small_set, **(SMALL | {"seed": 8}))
    assert before == {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="something else than scenes"):
            make_scenes.make_scenes(out, **SMALL)
    with pytest.raises(UserError, match="cannot write"):
        make_scenes.make_scenes(tmp_path / "mine.txt" / "out", **SMALL)


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_scenes, "write_images", full_disk)
    with pytest.raises(UserError, match="No space left"):
        make_scenes.make_scenes(tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key, value", [("train", 0), ("val", 0), ("size", 16), ("size", 1024), ("seed", -1), ("workers", 0)]
)
def test_bad_arguments_are_one_sentence(key: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--{key} is {value}: give a whole number from \d+ to \d+$"):
        make_scenes.make_scenes(tmp_path / "out", **(SMALL | {key: value}))
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_exit_code_2(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--size", "8"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr == "error: --size is 8: give a whole number from 32 to 512\n"
