"""Folders of images with masks or depth maps: three layouts, patches of the encoder's size, and every refusal."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed_runs import tiny_config
from made_up_masks import made_up, write_dense_folder, write_png
from PIL import Image

from ijepa_ds.config import parse_config
from ijepa_ds.data.ffcv_pipeline import DecodeError
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.dense_data import DenseData
from ijepa_ds.evaluation.dense_folders import IGNORED, VOC_CLASSES, read_depth


def opened(folder: Path, size: int | tuple[int, int] = 32, **options: Any) -> DenseData:
    given = {"dense_data": str(folder), "train_images": None, "validation_images": None, "micro_batch": 3}
    config = parse_config(tiny_config(ijepa__data__image_size=size, ijepa__model__patch_size=8))
    return DenseData(argparse.Namespace(**(given | options)), config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dense_folder(tmp_path / "plain")


def test_the_plain_layout(folder: Path) -> None:
    data = opened(folder, train_images=3)
    assert [len(samples) for samples in data.samples.values()] == [3, 4] and data.names == ["0", "1", "2"]
    assert [sample.image.name for sample in data.samples["train"]] == ["0.png", "2.png", "4.png"]
    for split, first in (("train", 0), ("validation", 1000)):
        for place, sample in enumerate(data.samples[split]):
            image, mask, depth = made_up(first + int(sample.image.stem))
            assert np.array_equal(data.patches[split].classes[place], mask[::8, ::8].ravel())
            np.testing.assert_allclose(data.patches[split].depth[place], depth[::8, ::8].ravel())
            (loaded,) = data.loader(split).batches(np.array([place]))
            assert np.array_equal(loaded[0].numpy(), image)
            assert np.array_equal(data.masks(split, [place])[0].numpy(), mask)
    assert data.patches["validation"].pixels.sum() == 4 * 32 * 32 and data.known("train").all()
    assert [len(batch) for batch in data.loader("validation").batches(np.arange(4))] == [3, 1]
    assert "3 and 4 images" in data.describe() and "(plain), 3 classes and depth" in data.describe()


def test_images_and_masks_are_resized_alike_and_whole(tmp_path: Path) -> None:
    """A bright right half stays the right half whatever the sides' ratio, in the image and in the patches."""
    image, mask = np.zeros((20, 60, 3), np.uint8), np.zeros((20, 60), np.uint8)
    image[:, 30:], mask[:, 30:] = 255, 1
    for split in ("train", "val"):
        write_png(tmp_path / "images" / split / "a.png", image)
        write_png(tmp_path / "masks" / split / "a.png", mask)
    data = opened(tmp_path, (16, 32))
    (loaded,) = data.loader("train").batches(np.array([0]))
    assert loaded.shape == (1, 16, 32, 3) and loaded[0, :, :15].max() < 20 and loaded[0, :, 17:].min() > 235
    assert data.patches["train"].classes.tolist() == [[0, 0, 1, 1] * 2] and data.patches["train"].depth is None
    assert data.masks("validation", [0])[0].shape == (20, 60)  # scored in its own size


def test_pixels_without_a_class_or_depth_are_left_out(folder: Path) -> None:
    mask, depth = np.full((32, 32), IGNORED, np.uint8), np.zeros((32, 32), np.float32)
    mask[:8, 8:], depth[:8, :16], depth[8, 8] = 2, 5.0, np.inf
    mask[8, 0] = 1
    write_png(folder / "masks" / "val" / "1.png", mask)
    np.save(folder / "depth" / "val" / "1.npy", depth)
    data = opened(folder)
    patches = data.patches["validation"]
    assert patches.classes[1].tolist() == [IGNORED, 2, 2, 2, 1] + [IGNORED] * 11
    np.testing.assert_array_equal(patches.depth[1], [5.0, 5.0] + [np.nan] * 14)
    assert np.flatnonzero(data.known("validation")[1]).tolist() == [1]
    assert patches.pixels[1] + patches.pixels[2] + patches.pixels[0] == 3 * 32 * 32 + 8 * 24 + 1


def test_ade20k(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        image, mask, _ = made_up(5)
        write_png(tmp_path / "images" / split / "ADE_1.jpg", image)
        raw = np.where(mask == 2, 150, mask)  # 0 has no label
        write_png(tmp_path / "annotations" / split / "ADE_1.png", raw.astype(np.uint8))
    data = opened(tmp_path)
    expected = np.select([mask == 1, mask == 2], [0, 149], IGNORED)
    assert np.array_equal(data.masks("train", [0])[0].numpy(), expected)
    assert len(data.names) == 150 and (data.names[0], data.names[149]) == ("1", "150")
    assert np.array_equal(data.patches["validation"].classes[0], expected[::8, ::8].ravel())
    write_png(tmp_path / "annotations" / "training" / "ADE_1.png", np.full((32, 32), 151, np.uint8))
    with pytest.raises(UserError, match="class index 151, but there are 150 classes, 1 to 150"):
        opened(tmp_path)


def test_voc(tmp_path: Path) -> None:
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, stem in (("train", "2007_1"), ("val", "2007_2")):
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{stem}\n")
        image, mask, _ = made_up(7)
        mask[0, 0], mask[-1, -1] = 255, 20
        write_png(tmp_path / "JPEGImages" / f"{stem}.jpg", image)
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette([k * 7 % 256 for k in range(768)])
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        picture.save(tmp_path / "SegmentationClass" / f"{stem}.png")
    data = opened(tmp_path)
    assert np.array_equal(data.masks("train", [0])[0].numpy(), mask) and data.names == VOC_CLASSES
    assert data.missing_classes() == ["tvmonitor"]  # one pixel is no patch
    (tmp_path / "SegmentationClass" / "2007_2.png").unlink()
    with pytest.raises(UserError, match=r"val\.txt names images of which .*2007_2\.png are missing"):
        opened(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt cannot be read"):
        opened(tmp_path)


def test_names_of_classes_say_how_many_there_are(folder: Path) -> None:
    (folder / "classes.txt").write_text("sky\nground\nhouse\n\n")
    assert opened(folder).names == ["sky", "ground", "house"]
    (folder / "classes.txt").write_text("sky\nground\n")
    with pytest.raises(UserError, match=r"masks/train/\d\.png has the class index 2, but there are 2 classes, 0 to 1"):
        opened(folder)
    (folder / "classes.txt").write_text("sky\n")
    with pytest.raises(UserError, match="names 1 classes"):
        opened(folder)


def test_depth_files(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", np.array([[1500, 0]], np.uint16))
    np.testing.assert_array_equal(read_depth(path), [[1.5, np.nan]])
    np.save(tmp_path / "a.npy", np.array([[-1.0, np.nan, 2.5]], np.float16))
    np.testing.assert_array_equal(read_depth(tmp_path / "a.npy"), [[np.nan, np.nan, 2.5]])
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 1)))
    with pytest.raises(UserError, match=r"holds float64 \[2, 2, 1\]"):
        read_depth(tmp_path / "a.npy")


def test_an_image_that_cannot_be_decoded_is_named(folder: Path) -> None:
    path = folder / "images" / "val" / "3.png"
    path.write_bytes(path.read_bytes()[:200])  # its header is whole
    data = opened(folder)
    with pytest.raises(DecodeError, match=r"val/3\.png cannot be read"):
        list(data.loader("validation").batches(np.arange(4)))


def _mask(folder: Path, split: str, pixels: np.ndarray) -> None:
    for path in (folder / "masks" / split).iterdir():
        write_png(path, pixels)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is no folder: give one with images/"),
    "no layout": (lambda folder: (folder / "images").rename(folder / "pictures"), "none of the known layouts"),
    "no truth": (lambda f: [shutil.rmtree(f / kind) for kind in ("masks", "depth")], "none of the known layouts"),
    "no images": (lambda f: [p.unlink() for p in (f / "images/val").iterdir()], "images/val has no images"),
    "a mask is missing": (
        lambda folder: (folder / "masks/train/3.png").unlink(),
        r"1 of the 6 images in .*images/train have no file of their name in .*masks/train: 3\.png; add",
    ),
    "no masks of val": (lambda folder: shutil.rmtree(folder / "masks/val"), "4 of the 4 images in .*masks/val"),
    "a depth map is missing": (lambda folder: (folder / "depth/val/0.npy").unlink(), "1 of the 4 .*depth/val: 0"),
    "another size": (
        lambda folder: write_png(folder / "masks/val/2.png", np.zeros((32, 16), np.uint8)),
        r"images/val/2\.png and .*masks/val/2\.png differ in size \(32 x 32 and 32 x 16 ",
    ),
    "depth of another size": (
        lambda folder: np.save(folder / "depth/val/2.npy", np.zeros((8, 8))),
        r"depth/val/2\.npy differ in size",
    ),
    "colours": (
        lambda folder: write_png(folder / "masks/val/2.png", np.zeros((32, 32, 3), np.uint8)),
        r"masks/val/2\.png is a picture in colours",
    ),
    "an unknown class": (
        lambda folder: write_png(folder / "masks/val/2.png", np.full((32, 32), 9, np.uint8)),
        r"class index 9, but there are 3 classes by the training masks in use: .*classes\.txt",
    ),
    "a number that no class has": (
        lambda folder: write_png(folder / "masks/val/2.png", np.full((32, 32), 256, np.uint16)),
        "class index 256, but there are 255 classes, 0 to 254",
    ),
    "one class": (lambda f: _mask(f, "train", np.full((32, 32), 2, np.uint8)), "training images are of one class"),
    "nothing labelled": (lambda f: _mask(f, "train", np.full((32, 32), IGNORED, np.uint8)), "or there are none"),
    "nothing to measure": (lambda f: _mask(f, "val", np.full((32, 32), IGNORED, np.uint8)), "nothing to measure on"),
    "no depth": (
        lambda folder: [np.save(path, np.zeros((32, 32))) for path in (folder / "depth/val").iterdir()],
        "no pixel of .* has a depth above 0",
    ),
    "no known patch": (
        lambda f: [write_png(path, np.zeros((32, 32), np.uint16)) for path in (f / "depth/train").iterdir()],
        "no patch of .* has both a class and a depth",
    ),
    "no PNG": (lambda folder: (folder / "masks/val/1.png").write_text("x"), r"masks/val/1\.png cannot be read"),
    "no image": (lambda folder: (folder / "images/val/1.png").write_text("x"), r"images/val/1\.png cannot be read"),
    "no .npy": (lambda folder: (folder / "depth/val/1.npy").write_text("x"), r"depth/val/1\.npy cannot be read"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_is_one_sentence(case: str, folder: Path) -> None:
    spoil, says = REFUSALS[case]
    spoil(folder)
    with pytest.raises(UserError, match=says) as caught:
        opened(folder)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, DecodeError)
