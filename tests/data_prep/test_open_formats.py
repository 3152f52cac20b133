"""to_ffcv.py on WebDataset tars, class tars, Parquet, Arrow and folders that `datasets` saved."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ffcv.reader import Reader
from PIL import Image

from data_prep import sources, to_ffcv
from data_prep.source import Source
from ijepa_ds.errors import UserError

CLASSES = ["tench, Tinca tinca", "goldfish", "white shark"]  # in the order of their numbers, not of their names


def png(number: int) -> bytes:
    """A picture that differs from that of every other number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def open_source(path: object, *, labelled: bool = True) -> Source:
    return sources.open_source(str(path), split=None, devkit=None, labelled=labelled)


def refused(path: object, *, labelled: bool = True) -> str:
    with pytest.raises(UserError) as error:
        open_source(path, labelled=labelled)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_pictures(source: Source, numbers: Sequence[int]) -> None:
    assert len(source) == len(numbers)
    for index in [*range(len(numbers)), 0]:  # back again at the end, as for a worker's next span
        assert source.read(index) == png(numbers[index])
    some = np.array([len(numbers) - 1, 0])
    taken = source.take(some)
    assert [taken.read(0), taken.read(1)] == [png(numbers[-1]), png(numbers[0])]


# Tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def web_samples(numbers: Sequence[int], beside: Callable[[int], dict[str, bytes]]) -> dict[str, bytes]:
    """Members a/KEY.png and those of ``beside``: suffix -> content."""
    files = {}
    for number in numbers:
        for suffix, data in {"png": png(number), **beside(number)}.items():
            files[f"./a/{number:03d}.{suffix}"] = data
    return files


def cls(number: int) -> dict[str, bytes]:
    return {"cls": b"%d" % (number % 3), "txt": b"a picture"}


def json_label(number: int) -> dict[str, bytes]:
    return {"json": json.dumps({"label": number % 3, "width": 16}).encode()}


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """Two tars with labels, one as .cls and one as .json."""
    write_tar(tmp_path / "in" / "in1k-train-0000.tar", web_samples(range(4), cls))
    write_tar(tmp_path / "in" / "in1k-train-0001.tar", web_samples(range(4, 7), json_label))
    return tmp_path / "in"


def test_webdataset_tars_by_folder_pattern_and_file(web: Path) -> None:
    for given in (web, web / "in1k-*.tar"):
        source = open_source(given)
        assert source.kind == "WebDataset tars" and source.labels["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert_pictures(source, range(7))
        assert source.names[4] == "in1k-train-0001.tar/./a/004.png" and source.ignored == {".txt": 4}
    one = open_source(web / "in1k-train-0001.tar")
    assert one.labels["label"].tolist() == [1, 2, 0]
    assert open_source(web, labelled=False).labels == {}


def test_webdataset_is_converted(web: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    assert to_ffcv.main([str(web), str(out), "--write-mode", "raw", "--workers", "2"]) == 0
    reader, whole = Reader(str(out)), out.read_bytes()
    assert reader.metadata["f1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    for number, pointer in enumerate(reader.metadata["f0"]["data_ptr"]):
        expected = np.asarray(Image.open(io.BytesIO(png(number)))).tobytes()
        assert whole[int(pointer) : int(pointer) + len(expected)] == expected


def test_odd_webdatasets_are_one_sentence(web: Path) -> None:
    mixed = web_samples(range(3), lambda number: cls(number) if number < 2 else {})
    assert "002.png in" in refused(write_tar(web / "in1k-train-0002.tar", mixed))
    assert "no label (.cls" in refused(web)
    for content, said in ((b"dog", "no number and no JSON"), (b"1.5", "no whole number"), (b"-1", "'label' is -1")):
        tar = write_tar(web / "odd.tar", web_samples([0], lambda _, content=content: {"cls": content}))
        assert said in refused(tar)
        assert_pictures(open_source(tar, labelled=False), [0])
    double = {"0.png": png(0), "0.seg.png": png(1), "0.cls": b"1"}
    assert "several images for one sample, 0.png and 0.seg.png" in refused(write_tar(web / "odd.tar", double))
    content = (web / "in1k-train-0000.tar").read_bytes()
    for length in (100, 600, 3000, 512 * (len(content.rstrip(b"\0")) // 512 + 1)):  # within and between members
        (web / "odd.tar").write_bytes(content[:length])
        assert "download a damaged one again" in refused(web / "odd*")
    assert "no file matches" in refused(web / "none-*.tar")
    (web / "odd.tar").unlink()
    (web / "notes.txt").write_text("")
    assert "end in .tar, .txt: give a pattern" in refused(web / "*")


def test_tars_of_one_class_each(tmp_path: Path) -> None:
    """ImageNet-22k, unpacked once."""
    for wnid, numbers in (("n02", (0, 1)), ("n01", (3, 2))):
        write_tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{number}.JPEG": png(number) for number in numbers})
    source = open_source(tmp_path)
    assert (source.kind, source.class_names) == ("class tars", ["n01", "n02"])
    assert source.labels["label"].tolist() == [0, 0, 1, 1]
    assert_pictures(source, [3, 2, 0, 1])
    write_tar(tmp_path / "n03.tar", {"else_1.JPEG": png(5)})
    assert open_source(tmp_path).labels == {}


def test_thousands_of_tars_are_not_open_at_once(tmp_path: Path) -> None:
    for number in range(6):
        write_tar(tmp_path / f"n{number}.tar", {f"n{number}_0.png": png(number)})
    source = open_source(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert_pictures(source, range(6))
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # of the source and of the part that was taken


# Tables


@pytest.fixture
def pa() -> Any:
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install '.[sources]')")


def table(pa: Any, numbers: Sequence[int], features: dict | None = None, **columns: list) -> Any:
    """Images as Hugging Face's data sets hold them, every other one without a path."""
    images = [{"bytes": png(number), "path": f"{number}.png" if number % 2 else None} for number in numbers]
    made = pa.table({"image": images, "label": [number % 3 for number in numbers], **columns})
    if features is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


HF = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}


def write_parquet(pa: Any, path: Path, made: Any) -> Path:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made, path, row_group_size=2)
    return path


def test_parquet_by_folder_pattern_and_file(pa: Any, tmp_path: Path) -> None:
    for number, rows in enumerate((range(5), range(5, 8))):
        write_parquet(pa, tmp_path / f"train-0000{number}-of-00002.parquet", table(pa, rows, HF))
    for given in (tmp_path, tmp_path / "train-*"):
        source = open_source(given)
        assert (source.kind, source.class_names) == ("Parquet tables", CLASSES)
        assert source.labels["label"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert_pictures(source, range(8))
    assert source.names[0] == "train-00000-of-00002.parquet/00000000" and source.names[7].endswith("/7.png")
    assert_pictures(open_source(tmp_path / "train-00001-of-00002.parquet", labelled=False), [5, 6, 7])


def test_parquet_is_converted_by_workers(pa: Any, tmp_path: Path) -> None:
    path = write_parquet(pa, tmp_path / "a.parquet", table(pa, range(9), HF))
    out = tmp_path / "out.beton"
    assert to_ffcv.main([str(path), str(out), "--workers", "2", "--shard", "2/2"]) == 0
    note = json.loads((tmp_path / "out-2-of-2.beton.json").read_text())
    assert note["class_names"] == CLASSES and note["samples_per_class"] == [1, 2, 2] and note["skipped"] == []


def test_other_columns(pa: Any, tmp_path: Path) -> None:
    """Plain bytes instead of a struct, no metadata, several labels, other names."""
    plain = pa.table({"jpg": [png(0), png(1)], "caption": ["a", "b"]})
    source = open_source(write_parquet(pa, tmp_path / "plain.parquet", plain))
    assert source.labels == {} and source.names[1] == "plain.parquet/00000001"
    assert_pictures(source, [0, 1])
    two = {"fine_label": HF["label"], "coarse_label": {"_type": "ClassLabel", "names": ["x"]}}
    several = table(pa, [0, 1], {**two, "image": HF["image"]}, fine_label=[2, 1], coarse_label=[0, 0])
    source = open_source(write_parquet(pa, tmp_path / "several.parquet", several))
    assert {name: values.tolist() for name, values in source.labels.items()} == {
        "fine_label": [2, 1],
        "coarse_label": [0, 0],
    }
    renamed = pa.table({"img": [png(0)], "labels": [4]})
    assert open_source(write_parquet(pa, tmp_path / "renamed.parquet", renamed)).labels["label"].tolist() == [4]


def test_odd_tables_are_one_sentence(pa: Any, tmp_path: Path) -> None:
    one = write_parquet(pa, tmp_path / "a" / "train-00000-of-00002.parquet", table(pa, range(2), HF))
    assert "1 of 2 files train-*-of-*.parquet" in refused(tmp_path / "a")
    write_parquet(pa, tmp_path / "a" / "test-00000-of-00001.parquet", table(pa, range(2), HF))
    assert "files of test, train, which may be several splits" in refused(tmp_path / "a")
    unlabelled = pa.table({"image": [png(0)], "label": [-1]})
    assert "'label' is -1" in refused(write_parquet(pa, tmp_path / "test.parquet", unlabelled))
    assert "rows without 'label'" in refused(
        write_parquet(pa, tmp_path / "null.parquet", pa.table({"image": [png(0), png(1)], "label": [1, None]}))
    )
    two = pa.table({"left": [png(0)], "right": [png(1)]})
    assert "several columns of image bytes" in refused(write_parquet(pa, tmp_path / "two.parquet", two))
    assert "no column of image bytes" in refused(
        write_parquet(pa, tmp_path / "text.parquet", pa.table({"text": ["a"]}))
    )
    other = write_parquet(pa, tmp_path / "b" / "1.parquet", pa.table({"image": [png(0)]}))
    one.rename(other.with_name("0.parquet"))
    assert "has not the column 'image'" in refused(tmp_path / "b")
    other.write_bytes(other.read_bytes()[:40])
    assert "get the damaged file again" in refused(other)


def test_a_damaged_row_group_is_an_unreadable_image(pa: Any, tmp_path: Path) -> None:
    from pyarrow import parquet

    path = write_parquet(pa, tmp_path / "a.parquet", table(pa, range(4), HF))
    source = open_source(path)
    column = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(OSError):
        source.read(0)
    assert source.read(2) == png(2)


def save_to_disk(pa: Any, folder: Path, parts: Sequence[Any], **state: object) -> Path:
    """As `datasets` lays it out."""
    folder.mkdir(parents=True)
    files = []
    for number, part in enumerate(parts):
        files.append({"filename": f"data-{number:05d}-of-{len(parts):05d}.arrow"})
        with pa.OSFile(str(folder / files[-1]["filename"]), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as out:
            out.write_table(part, max_chunksize=2)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_data_files": None, **state}))
    return folder


def test_a_folder_that_datasets_saved(pa: Any, tmp_path: Path) -> None:
    folder = save_to_disk(pa, tmp_path / "all" / "train", [table(pa, range(5), HF), table(pa, range(5, 8), HF)])
    source = open_source(folder)
    assert (source.kind, source.class_names) == ("Arrow tables", CLASSES)
    assert source.labels["label"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert_pictures(source, range(8))
    (tmp_path / "all" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert f"give one of them as SOURCE, such as {folder}" in refused(tmp_path / "all")
    (folder / "state.json").write_text(json.dumps({"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "flatten_indices()" in refused(folder)
    (folder / "state.json").write_text("{")
    assert "state.json cannot be read" in refused(folder)


def test_an_arrow_file_with_a_footer(pa: Any, tmp_path: Path) -> None:
    made = table(pa, range(3), HF)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, made.schema) as out:
        out.write_table(made, max_chunksize=2)
    assert_pictures(open_source(tmp_path / "a.arrow"), range(3))


def test_images_that_a_table_only_names(pa: Any, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    named = pa.table({"image": pa.array([{"bytes": None, "path": "0.png"}, {"bytes": None, "path": None}], struct(pa))})
    source = open_source(write_parquet(pa, tmp_path / "a.parquet", named))
    assert source.read(0) == png(0) and source.read(1) == b""


def struct(pa: Any) -> Any:
    return pa.struct({"bytes": pa.binary(), "path": pa.string()})


def test_without_pyarrow_tables_are_one_sentence_and_tars_are_read(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pyarrow, which is not installed: pip install pyarrow" in refused(tmp_path / "a.parquet")
    assert len(open_source(web)) == 7
