"""to_ffcv.py --shard: parts that are converted apart are, one after the other, what one conversion writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ffcv.reader import Reader
from PIL import Image

from data_prep import to_ffcv
from data_prep.parts import parse_part
from ijepa_ds.data.beton import inspect_dataset, read_labels, read_names
from ijepa_ds.errors import UserError


def convert(*arguments: object) -> int:
    return to_ffcv.main([str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        convert(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def stored(path: Path) -> list[tuple[int, bytes]]:
    """How each image is stored, and its bytes."""
    reader, whole = Reader(str(path)), path.read_bytes()
    size_of = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    rows = ((int(row["mode"]), int(row["data_ptr"])) for row in reader.metadata["f0"])
    return [(mode, whole[pointer : pointer + size_of[pointer]]) for mode, pointer in rows]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """11 pictures of three classes, the last of which is small enough to lie in the last part alone."""
    for number in range(11):
        file = tmp_path / "in" / "abc"[number // 5] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return tmp_path / "in"


def test_parts_are_one_conversion_cut(images: Path, tmp_path: Path) -> None:
    """With `proportion`, whose choice depends on a sample's number in the whole source."""
    options = ("--write-mode", "proportion", "--workers", 1)
    assert convert(images, tmp_path / "whole.beton", *options) == 0
    for part in (3, 1, 2):
        assert convert(images, tmp_path / "train.beton", "--shard", f"{part}/3", *options) == 0
    parts = [tmp_path / f"train-{part}-of-3.beton" for part in (1, 2, 3)]
    joined = [image for part in parts for image in stored(part)]
    assert joined == stored(tmp_path / "whole.beton") and {mode for mode, _ in joined} == {0, 1}
    one, several = inspect_dataset(tmp_path / "whole.beton"), inspect_dataset(tmp_path / "train-*.beton")
    assert several.paths == tuple(map(str, parts))
    assert (read_labels(several, "label") == read_labels(one, "label")).all() and read_names(several) == read_names(one)
    notes = [json.loads(Path(f"{part}.json").read_text()) for part in parts]
    assert [note["num_samples"] for note in notes] == [3, 4, 4]
    assert [note["class_names"] for note in notes] == [["a", "b", "c"]] * 3
    shards = [note["shard"] for note in notes]
    assert [(shard["index"], shard["of"], shard["first"]) for shard in shards] == [(1, 3, 0), (2, 3, 3), (3, 3, 7)]
    assert len({shard["listing"] for shard in shards}) == 1 and shards[0]["images"] == 11


def test_a_part_of_another_listing_does_not_fit(images: Path, tmp_path: Path) -> None:
    """A machine whose copy of the source lacks an image; another place of the same images is no other listing."""
    copy = Path(shutil.copytree(images, tmp_path / "elsewhere"))
    assert convert(images, tmp_path / "train.beton", "--shard", "1/2") == 0
    assert convert(copy, tmp_path / "train.beton", "--shard", "2/2") == 0
    assert inspect_dataset(tmp_path / "train-*.beton").num_samples == 11
    (copy / "c" / "10.png").unlink()
    assert convert(copy, tmp_path / "train.beton", "--shard", "2/2", "--force") == 0
    with pytest.raises(UserError, match="did not list the same images"):
        inspect_dataset(tmp_path / "train-*.beton")


def test_what_is_no_part_is_refused(images: Path, tmp_path: Path) -> None:
    assert parse_part("2/16") == (2, 16)
    for text in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0", "1/2/3"):
        assert f"--shard is {text}: give i/n" in refused(images, tmp_path / "out.beton", f"--shard={text}")
    assert "has no images, as there are 11" in refused(images, tmp_path / "out.beton", "--shard", "1/12")
    assert "ends in .beton" in refused(images, tmp_path / "out", "--shard", "1/2")
    convert(images, tmp_path / "out.beton", "--shard", "1/2")
    assert "out-1-of-2.beton exists already" in refused(images, tmp_path / "out.beton", "--shard", "1/2")
