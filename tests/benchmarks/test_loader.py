"""The loader's benchmark and that of the masks run, and put every number where it belongs."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import loader
import masks
import numpy as np
import pytest


@pytest.mark.long
def test_the_loaders_benchmark_compares_four_sides_on_the_same_images(tmp_path, monkeypatch):
    files, convert = [], loader.converted

    def watched(images: Path, beton: Path, resolution: int):
        dataset = convert(images, beton, resolution)
        files.extend(path.read_bytes() for path in sorted((beton.with_suffix("") / "one").iterdir()))
        return dataset

    for number in range(5):
        (tmp_path / f"class{number}").mkdir()
        coarse = np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"class{number}" / "one.png"), cv2.resize(coarse, (40, 48)))
    monkeypatch.setattr(loader, "converted", watched)
    path = tmp_path / "loader.json"
    options = ["--images", str(tmp_path), "--count", "16", "--resolutions", "40", "--workers", "1", "--batch", "4"]
    loader.main([*options, "--rounds", "1", "--steps-epochs", "3", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["compared"].startswith("The pretraining loader against bare FFCV")
    (result,) = record["results"]
    assert (result["resolution"], result["workers"]) == (40, 1)
    assert list(result["sides"]) == [loader.OURS, loader.FFCV, loader.DECODER, loader.TORCHVISION]
    assert all(side["images_per_second"] > 0 and side["over_ffcv"] > 0 for side in result["sides"].values())
    assert result["sides"][loader.FFCV]["over_ffcv"] == 1
    assert min(result["steps"].values()) > 0
    # The files that torchvision reads are the JPEGs of the .beton: the five images, one after the other.
    assert len(files) == 16 and len(set(files)) == 5 and files[0] == files[5] == files[15]
    assert cv2.imdecode(np.frombuffer(files[0], np.uint8), cv2.IMREAD_COLOR).shape == (40, 33, 3)


def test_the_masks_benchmark_says_their_time_and_their_share(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "GRIDS", [(16, 16), (8, 8)])
    monkeypatch.setattr(masks, "REFERENCE_GRIDS", [(16, 16)])
    monkeypatch.setattr(masks, "loader_us_per_image", lambda options: 100.0)
    path = tmp_path / "masks.json"
    masks.main(["--rounds", "3", "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    assert results["us_per_image"] == results["samplers"]["16 x 16 multiblock, K = 72"] > 0
    assert results["share_of_the_loaders_time"] == pytest.approx(results["us_per_image"] / 100, abs=1e-4)
    assert list(results["samplers"])[1:] == ["8 x 8 multiblock, K = 18", "16 x 16 reference"]
