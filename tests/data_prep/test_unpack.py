"""to_ffcv.py --unpack: what was converted comes back as files and a table, and can be converted again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from ffcv.reader import Reader
from PIL import Image

from data_prep import images, to_ffcv, unpack
from data_prep.beton_check import Samples
from data_prep.images import EncodedImage
from ijepa_ds.data.beton import inspect_dataset, read_labels
from ijepa_ds.errors import UserError


def run(*arguments: object) -> int:
    return to_ffcv.main([str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def stored(path: Path) -> list[EncodedImage]:
    samples = Samples(Reader(str(path)), str(path))
    with path.open("rb") as file:
        return [samples.stored(file.fileno(), sample) for sample in range(len(samples))]


def pixels(image: EncodedImage) -> np.ndarray:
    if image.mode == images.RAW:
        return image.payload.reshape(image.height, image.width, 3)
    return images.decode_rgb(image.payload.tobytes())


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Classes a, b (empty) and c with seven pictures of several sizes."""
    for number in range(7):
        path = tmp_path / "in" / "aaacccc"[number] / f"picture {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (20 + number, 30, 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)).save(path)
    (tmp_path / "in" / "b").mkdir()
    return tmp_path / "in"


def test_class_folders_come_back_and_are_converted_to_the_same_pixels_and_labels(classes: Path, tmp_path: Path) -> None:
    first, folder, second = tmp_path / "first.beton", tmp_path / "deep" / "out", tmp_path / "second.beton"
    assert run(classes, first, "--write-mode", "proportion") == 0
    assert run(first, "--unpack", folder, "--workers", 2) == 0
    before = stored(first)
    assert {image.mode for image in before} == {images.JPG, images.RAW}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c", "labels.csv"]
    rows = table(folder)
    for sample, (row, image) in enumerate(zip(rows, before, strict=True)):
        suffix = "jpg" if image.mode == images.JPG else "png"
        name = "aaacccc"[sample]
        assert row["file"] == f"{name}/{sample:08d}.{suffix}"
        assert (row["class"], row["name"]) == (name, f"{name}/picture {sample}.png")
        data = (folder / row["file"]).read_bytes()
        if image.mode == images.JPG:
            assert data == image.payload.tobytes()  # not encoded again
        np.testing.assert_array_equal(images.decode_rgb(data), pixels(image))
    assert run(folder, second, "--write-mode", "raw") == 0
    for one, other in zip(before, stored(second), strict=True):
        np.testing.assert_array_equal(pixels(one), pixels(other))
    labels = [read_labels(inspect_dataset(path), "label").tolist() for path in (first, second)]
    assert labels[0] == labels[1] == [0, 0, 0, 2, 2, 2, 2] == [int(row["label"]) for row in rows]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_parts_come_back_as_one(classes: Path, tmp_path: Path) -> None:
    for part in (1, 2):
        assert run(classes, tmp_path / "in.beton", "--shard", f"{part}/2") == 0
    assert run(tmp_path / "in-*.beton", "--unpack", tmp_path / "out") == 0
    assert [row["file"][:10] for row in table(tmp_path / "out")] == [f"{'aaacccc'[n]}/{n:08d}" for n in range(7)]


def test_classes_whose_names_cannot_be_folders_are_numbered(classes: Path, tmp_path: Path) -> None:
    """Names of other data sets are in the order of their numbers, and hold slashes."""
    run(classes, tmp_path / "a.beton", "--write-mode", "raw")
    note = tmp_path / "a.beton.json"
    for number, names in enumerate(
        (["zebra", "cat", "ant"], ["a", "b/c", "d"], ["a", "a", "b"], ["test", "train", "val"])
    ):
        note.write_text(json.dumps({**json.loads(note.read_text()), "class_names": names}))
        folder = tmp_path / f"out{number}"
        assert run(tmp_path / "a.beton", "--unpack", folder) == 0
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["00000", "00001", "00002"]
        assert table(folder)[3]["class"] == names[2]
        assert run(folder, tmp_path / "again.beton", "--write-mode", "raw", "--force") == 0
        assert read_labels(inspect_dataset(tmp_path / "again.beton"), "label").tolist() == [0, 0, 0, 2, 2, 2, 2]
    for path in (note, Path(f"{tmp_path}/a.beton.names.gz")):
        path.unlink()
    assert run(tmp_path / "a.beton", "--unpack", tmp_path / "plain") == 0
    assert table(tmp_path / "plain")[6] == {"file": "00002/00000006.png", "label": "2"}


def test_other_labels_are_in_the_table_alone(make_beton, tmp_path: Path) -> None:
    path = make_beton(tmp_path / "a.beton", 3, labels={"count": [3, -1, 2], "depth": [0.1, 2.5, 1e-17]})
    assert run(path, "--unpack", tmp_path / "out") == 0
    rows = table(tmp_path / "out")
    assert [float(row["depth"]) for row in rows] == [0.1, 2.5, 1e-17] and rows[1]["count"] == "-1"
    assert [row["file"] for row in rows] == [f"{sample:08d}.jpg" for sample in range(3)]
    assert run(make_beton(tmp_path / "b.beton", 2, labels={"label": [-1, 5]}), "--unpack", tmp_path / "other") == 0
    assert [row["label"] for row in table(tmp_path / "other")] == ["-1", "5"]


def test_what_cannot_be_unpacked_is_one_sentence_and_leaves_nothing(
    make_beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_beton(tmp_path / "a.beton", 3, write_mode="raw")
    out = tmp_path / "out"
    assert "give FILE.beton --unpack FOLDER" in refused("--unpack", out)
    assert "and no OUT.beton" in refused(path, tmp_path / "b.beton", "--unpack", out)
    assert "--verify checks" in refused("--verify", path, "--unpack", out)
    assert "does not exist" in refused(tmp_path / "none.beton", "--unpack", out)
    assert "exists already" in refused(path, "--unpack", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(unpack.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
        assert "make room" in refused(path, "--unpack", out)
    reader = Reader(str(path))
    start = path.read_bytes().index(reader.metadata.tobytes())
    rows = np.memmap(path, reader.metadata.dtype, "r+", offset=start, shape=(3,))
    rows["f0"]["height"][1] += 1
    rows.flush()
    assert "sample 1 of" in (message := refused(path, "--unpack", out)) and "nothing was kept" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.beton"]
