"""data_prep/to_ffcv.py: every kind of source, every odd kind of image, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ffcv.reader import Reader
from PIL import Image, ImageOps

from data_prep import beton_writer, images, sources, to_ffcv
from data_prep.source import PackedNames
from ijepa_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(number: int, *, width: int = 40, height: int = 24) -> Image.Image:
    """A picture that differs from that of every other number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_bytes(image: Image.Image, suffix: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def write_png(path: Path, number: int, **size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, **size).save(path)


def convert(source: Path, out: Path, *options: object) -> int:
    return to_ffcv.main([str(source), str(out), *(str(option) for option in options)])


def refused(*arguments: object) -> str:
    """The one sentence with which the command refuses these arguments."""
    with pytest.raises(UserError) as error:
        to_ffcv.main([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def stored(out: Path) -> tuple[Reader, list[bytes]]:
    """FFCV's own reader, and the stored bytes of each image, found as FFCV finds them."""
    reader = Reader(str(out))
    size_of = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    whole = out.read_bytes()
    pointers = reader.metadata["f0"]["data_ptr"].tolist()
    assert sorted(pointers) == sorted(size_of)
    assert [pointers[sample] for sample in reader.alloc_table["sample_id"]] == reader.alloc_table["ptr"].tolist()
    return reader, [whole[pointer : pointer + size_of[pointer]] for pointer in pointers]


def raw_pixels(out: Path) -> list[np.ndarray]:
    reader, data = stored(out)
    rows = reader.metadata["f0"]
    assert set(rows["mode"]) == {images.RAW}
    return [
        np.frombuffer(bytes_, np.uint8).reshape(row["height"], row["width"], 3)
        for row, bytes_ in zip(rows, data, strict=True)
    ]


def note_of(out: Path) -> dict:
    return json.loads(Path(f"{out}.json").read_text())


def names_of(out: Path) -> list[str]:
    return gzip.decompress(Path(f"{out}.names.gz").read_bytes()).decode().splitlines()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CLASSES_NAMES = ["ant/5.png", "ant/6.png", "ant/7.png", "ant/deeper/8.PNG", *(f"cat/{n}.png" for n in range(5))]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes with 5 + 4 pictures, one of them nested, and things that are no images."""
    root = tmp_path / "in"
    for number in range(5):
        write_png(root / "cat" / f"{number}.png", number)
    for number in range(5, 8):
        write_png(root / "ant" / f"{number}.png", number)
    write_png(root / "ant" / "deeper" / "8.PNG", 8)
    (root / "ant" / ".hidden.png").write_text("")
    (root / "readme.txt").write_text("not an image")
    return root


# Sources


def test_class_folders(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "on the way" / "out.beton"
    assert convert(classes, out, "--write-mode", "raw", "--workers", 2) == 0
    reader, _ = stored(out)
    assert reader.field_names == ["image", "label"]
    assert reader.metadata["f1"].tolist() == [0] * 4 + [1] * 5
    for pixels, number in zip(raw_pixels(out), [5, 6, 7, 8, 0, 1, 2, 3, 4], strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture(number)))
    note = note_of(out)
    assert note["class_names"] == ["ant", "cat"] and note["samples_per_class"] == [4, 5]
    assert note["label_fields"] == {"label": "int"} and note["source"] == str(classes)
    assert note["ignored"] == {"hidden": 1, ".txt": 1} and note["skipped"] == []
    assert note["image_size"] == {"height": [24, 24], "width": [40, 40]}
    assert note["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest() and note["bytes"] == out.stat().st_size
    assert leftovers(out.parent) == ["out.beton", "out.beton.crc32", "out.beton.json", "out.beton.names.gz"]
    assert names_of(out) == CLASSES_NAMES
    assert to_ffcv.main(["--verify", str(out)]) == 0


def test_images_directly_in_the_folder_have_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        write_png(tmp_path / "in" / f"{number}.png", number)
    assert convert(tmp_path / "in", tmp_path / "out.beton") == 0
    assert stored(tmp_path / "out.beton")[0].field_names == ["image"]
    assert note_of(tmp_path / "out.beton")["label_fields"] == {}


def test_nested_folder_without_labels(classes: Path, tmp_path: Path) -> None:
    write_png(classes / "directly.png", 9)
    assert "--no-labels" in refused(classes, tmp_path / "out.beton")
    assert convert(classes, tmp_path / "out.beton", "--no-labels") == 0
    reader, _ = stored(tmp_path / "out.beton")
    assert reader.field_names == ["image"] and reader.num_samples == 10


def test_a_folder_of_splits_is_not_a_folder_of_classes(tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "train" / "cat" / "0.png", 0)
    write_png(tmp_path / "in" / "test" / "cat" / "0.png", 1)
    assert f"{tmp_path}/in/test" in refused(tmp_path / "in", tmp_path / "out.beton")


def test_links_to_folders_are_followed_but_not_in_a_circle(classes: Path, tmp_path: Path) -> None:
    (classes / "ant" / "around").symlink_to(classes)
    (classes / "dog").symlink_to(classes / "cat")
    os.mkfifo(classes / "cat" / "pipe.png")
    source = sources.open_source(str(classes), split=None, devkit=None, labelled=True)
    assert np.bincount(source.labels["label"]).tolist() == [4 + 5 + 5, 5, 5]  # "around" leads to cat and dog
    assert source.ignored["link to a folder above"] == 1 and source.ignored["not a file"] == 4


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_imagenet_train_tar(tmp_path: Path) -> None:
    source = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(source, "w") as outer:
        for wnid, numbers in (("n02", (0, 1, 2)), ("n01", (4, 3))):
            inner_bytes = io.BytesIO()
            with tarfile.open(fileobj=inner_bytes, mode="w") as inner:
                for number in numbers:
                    add_file(inner, f"{wnid}_{number}.JPEG", file_bytes(picture(number)))
            add_file(outer, f"{wnid}.tar", inner_bytes.getvalue())
    out = tmp_path / "out.beton"
    assert convert(source, out, "--write-mode", "raw", "--workers", 2) == 0
    assert stored(out)[0].metadata["f1"].tolist() == [0, 0, 1, 1, 1]
    assert note_of(out)["class_names"] == ["n01", "n02"]
    for pixels, number in zip(raw_pixels(out), [3, 4, 0, 1, 2], strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture(number)))
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    assert "download a damaged one again" in refused(source, tmp_path / "second.beton")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A development kit of 3 classes, numbered unlike their sorted WordNet IDs, and an inner node of the tree."""
    scipy_io = pytest.importorskip("scipy.io")
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    rows = [(1, "n03", "c", 0), (2, "n01", "a", 0), (3, "n02", "b", 0), (4, "n00", "all", 3)]
    kit = tmp_path / "kit" / "ILSVRC2012_devkit_t12"
    (kit / "data").mkdir(parents=True)
    scipy_io.savemat(kit / "data" / "meta.mat", {"synsets": np.array(rows, dtype=fields)[:, None]})
    (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n1\n")
    return kit


@pytest.fixture
def validation_tar(tmp_path: Path) -> Path:
    source = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(source, "w") as tar:
        for number in (3, 1, 4, 2):  # not in order, as nothing promises that it is
            add_file(tar, f"ILSVRC2012_val_{number:08d}.JPEG", file_bytes(picture(number)))
    return source


def test_imagenet_validation_tar(devkit: Path, validation_tar: Path, tmp_path: Path) -> None:
    archive = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(devkit, devkit.name)
    for number, kit in enumerate((archive, devkit, devkit.parent)):
        out = tmp_path / f"{number}.beton"
        assert convert(validation_tar, out, "--devkit", kit, "--write-mode", "raw") == 0
        assert stored(out)[0].metadata["f1"].tolist() == [2, 0, 1, 2]
        np.testing.assert_array_equal(raw_pixels(out)[2], np.asarray(picture(3)))
    assert note_of(out)["class_names"] == ["n01", "n02", "n03"]


def test_imagenet_validation_tar_needs_the_kit_or_no_labels(validation_tar: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    assert "--devkit" in refused(validation_tar, out)
    assert "development kit" in refused(validation_tar, out, "--devkit", tmp_path / "missing")
    assert convert(validation_tar, out, "--no-labels") == 0
    assert stored(out)[0].field_names == ["image"]


def write_clevr(root: Path) -> None:
    scenes = []
    for number, depths in enumerate([[9.5, 7.25, 8.0], [11.0]]):
        name = f"CLEVR_val_{number:06d}.png"
        write_png(root / "images" / "val" / name, number)
        objects = [{"pixel_coords": [1, 2, depth], "shape": "cube"} for depth in depths]
        scenes.append({"image_filename": name, "objects": objects, "relationships": {"left": [[]]}, "split": "val"})
    (root / "scenes").mkdir()
    (root / "scenes" / "CLEVR_val_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))


def test_clevr(tmp_path: Path) -> None:
    write_clevr(tmp_path / "in")
    out = tmp_path / "out.beton"
    assert "val" in refused(tmp_path / "in", out)
    assert "'train'" in refused(tmp_path / "in", out, "--split", "train")
    assert convert(tmp_path / "in", out, "--split", "val") == 0
    reader, _ = stored(out)
    assert reader.field_names == ["image", "count", "depth"]
    assert reader.metadata["f1"].tolist() == [3, 1] and reader.metadata["f2"].tolist() == [7.25, 11.0]
    assert note_of(out)["label_fields"] == {"count": "int", "depth": "float"}
    (tmp_path / "in" / "images" / "val" / "CLEVR_val_000001.png").unlink()
    assert "CLEVR_val_000001.png" in refused(tmp_path / "in", tmp_path / "second.beton", "--split", "val")
    (tmp_path / "in" / "scenes" / "CLEVR_val_scenes.json").write_text('{"scenes": [{"image_filename": "a"}]}')
    assert "cannot read the scenes" in refused(tmp_path / "in", tmp_path / "second.beton", "--split", "val")


# Images


@pytest.mark.parametrize(
    ("image", "suffix", "options", "expected"),
    [
        (Image.new("L", (8, 8), 77), "PNG", {}, (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", {}, WHITE),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", {}, RED),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {"quality": 100}, RED),  # Adobe's inverted ink
        (Image.new("RGB", (8, 8), BLUE).quantize(4), "PNG", {}, BLUE),
        (Image.new("RGB", (8, 8), BLUE).quantize(4), "PNG", {"transparency": 0}, WHITE),
        (Image.new("RGB", (8, 8), BLUE).quantize(4), "GIF", {}, BLUE),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG", {}, WHITE),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "PNG", {}, (255, 204, 204)),
        (Image.new("LA", (8, 8), (0, 51)), "PNG", {}, (204, 204, 204)),
        (Image.new("RGB", (8, 8), GREEN), "PNG", {"transparency": GREEN}, WHITE),
        (Image.new("RGB", (8, 8), GREEN), "WEBP", {"lossless": True}, GREEN),
        (Image.new("I;16", (8, 8), 40000), "PNG", {}, (156, 156, 156)),  # 40000 / 257, where clipping gives 255
        (Image.new("I;16", (8, 8), 40000), "TIFF", {}, (156, 156, 156)),
        (Image.new("I;16", (8, 8), 40000), "PNG", {"transparency": 40000}, WHITE),
    ],
)
def test_odd_kinds_of_image(image: Image.Image, suffix: str, options: dict, expected: tuple) -> None:
    pixels = images.decode_rgb(file_bytes(image, suffix, **options))
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (3 if suffix == "JPEG" else 0), pixels[0, 0]


def test_16_bit_netpbm_is_scaled() -> None:
    data = b"P5 4 4 65535\n" + np.full((4, 4), 40000, ">u2").tobytes()
    np.testing.assert_array_equal(images.decode_rgb(data), np.full((4, 4, 3), 156))


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    data = file_bytes(picture(0), suffix, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (expected.shape[0] > expected.shape[1]) == (orientation >= 5)
    np.testing.assert_array_equal(images.decode_rgb(data), expected)


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = file_bytes(picture(0), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff nonsense")
    with images.quiet_decoding():
        assert images.decode_rgb(data).shape == (24, 40, 3)


def test_what_is_not_a_whole_image_is_unreadable() -> None:
    jpeg, png = file_bytes(picture(0), "JPEG"), file_bytes(picture(0))
    floats = file_bytes(Image.new("F", (8, 8), 0.5), "TIFF")
    for data in (b"", b"no image", jpeg[: len(jpeg) // 2], png[: len(png) // 2], png[:30], jpeg[:10], floats):
        with pytest.raises(images.UnreadableImage):
            images.decode_rgb(data)
    with pytest.raises(images.UnreadableImage, match="known format"):
        images.decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n")  # Pillow would hand it to Ghostscript


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((375, 500), (512, None), (375, 500)),  # never larger
        ((375, 500), (512, 400), (375, 500)),
        ((600, 800), (512, None), (384, 512)),
        ((600, 800), (512, 256), (256, 341)),
        ((400, 2000), (512, 256), (102, 512)),  # the bound of the longer side wins
        ((3, 5000), (512, None), (1, 512)),
        ((999, 999), (512, None), (512, 512)),
    ],
)
def test_target_size(size: tuple, bounds: tuple, expected: tuple) -> None:
    assert images.target_size(*size, bound=bounds[0], short_bound=bounds[1]) == expected


def test_resolution_bounds_what_is_stored(tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "a.png", 0, width=64, height=32)
    write_png(tmp_path / "in" / "b.png", 1, width=20, height=30)
    assert convert(tmp_path / "in", tmp_path / "1.beton", "--max-resolution", 40) == 0
    assert note_of(tmp_path / "1.beton")["image_size"] == {"height": [20, 30], "width": [20, 40]}
    assert convert(tmp_path / "in", tmp_path / "2.beton", "--resize-short", 24) == 0
    assert note_of(tmp_path / "2.beton")["image_size"] == {"height": [24, 30], "width": [20, 48]}


# Settings


@pytest.mark.parametrize("options", [("--write-mode", "proportion"), ("--write-mode", "jpg", "--jpeg-quality", "70")])
def test_the_number_of_workers_changes_nothing(classes: Path, tmp_path: Path, options: tuple) -> None:
    results = []
    for workers in (1, 2, 3):
        out = tmp_path / f"{workers}.beton"
        assert convert(classes, out, "--workers", workers, *options) == 0
        reader, data = stored(out)
        results.append((data, reader.metadata["f0"]["mode"].tolist(), reader.metadata["f1"].tolist()))
    assert results[0] == results[1] == results[2]
    if "proportion" in options:
        assert set(results[0][1]) == {images.JPG, images.RAW}


def test_proportion_and_smart() -> None:
    expected = [0.8833108082136427, 0.43152799704851, 0.9986303058745142]
    assert [images.uniform(sample) for sample in (0, 1, 123456)] == expected  # files were made with them
    share = np.mean([images.uniform(sample) < 0.3 for sample in range(20_000)])
    assert abs(share - 0.3) < 0.01
    pixels = np.asarray(picture(0))
    for threshold, mode in ((pixels.nbytes, images.RAW), (pixels.nbytes - 1, images.JPG)):
        encoding = images.Encoding(write_mode="smart", smart_threshold=threshold)
        assert images.encode_image(pixels, 0, encoding).mode == mode


def test_limit_is_spread_evenly(classes: Path, tmp_path: Path) -> None:
    assert convert(classes, tmp_path / "out.beton", "--limit", 3, "--write-mode", "raw") == 0
    assert stored(tmp_path / "out.beton")[0].metadata["f1"].tolist() == [0, 0, 1]
    np.testing.assert_array_equal(raw_pixels(tmp_path / "out.beton")[2], np.asarray(picture(2)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--max-resolution", 0), "--max-resolution"),
        (("--jpeg-quality", 101), "--jpeg-quality"),
        (("--workers", 0), "--workers"),
        (("--limit", 0), "--limit"),
        (("--resize-short", 600, "--max-resolution", 512), "--resize-short"),
        (("--write-mode", "smart"), "--smart-threshold"),
        (("--smart-threshold", 5), "--smart-threshold"),
        (("--compress-probability", 0.1), "--compress-probability"),
        (("--write-mode", "proportion", "--compress-probability", "nan"), "--compress-probability"),
        (("--split", "val"), "--split"),
        (("--devkit", "kit", "--no-labels"), "--devkit"),
        (("--verify", "x.beton"), "--verify"),
    ],
)
def test_impossible_options_are_refused(classes: Path, tmp_path: Path, options: tuple, named: str) -> None:
    assert named in refused(classes, tmp_path / "out.beton", *options)
    assert leftovers(tmp_path) == ["in"]


def test_refusals_of_source_and_out(classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    assert "does not exist" in refused(tmp_path / "missing", out)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty", out)
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "no images found" in refused(tmp_path / "empty", out)
    assert "uncompressed tar" in refused(tmp_path / "empty" / "notes.txt", out)
    assert "ends in .beton" in refused(classes, tmp_path / "out")
    assert "both needed" in refused(classes)
    assert "cannot write" in refused(classes, classes / "readme.txt" / "out.beton")
    out.write_text("precious")
    assert "--force" in refused(classes, out)
    assert out.read_text() == "precious"
    assert convert(classes, out, "--force") == 0
    assert to_ffcv.main(["--verify", str(out)]) == 0


def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / "to_ffcv.py"), "missing", "out.beton"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: SOURCE missing does not exist: check the path\n"


# What goes wrong on the way


@pytest.fixture
def damaged(classes: Path) -> Path:
    """``classes`` with three unreadable files: the first, one in the middle and the last."""
    (classes / "ant" / "0.jpg").write_bytes(b"")
    (classes / "cat" / "00.jpg").write_bytes(file_bytes(picture(3), "JPEG")[:-200])
    (classes / "cat" / "9.jpg").symlink_to(classes / "nowhere.jpg")
    return classes


def test_unreadable_files_fail_the_conversion(damaged: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert "3 of 12 files" in refused(damaged, tmp_path / "out.beton", "--workers", 2)
    shown = capfd.readouterr().err
    for name in ("ant/0.jpg: the file is empty", "cat/00.jpg: OSError: image file is truncated", "cat/9.jpg: No such"):
        assert name in shown
    assert leftovers(tmp_path) == ["in"]


def test_unreadable_files_can_be_left_out(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    assert convert(damaged, out, "--workers", 2, "--write-mode", "raw", "--skip-unreadable") == 0
    reader, _ = stored(out)
    assert reader.num_samples == len(reader.metadata) == len(reader.alloc_table) == 9
    assert reader.metadata["f1"].tolist() == [0] * 4 + [1] * 5
    for pixels, number in zip(raw_pixels(out), [5, 6, 7, 8, 0, 1, 2, 3, 4], strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture(number)))
    note = note_of(out)
    assert [skipped["file"] for skipped in note["skipped"]] == ["ant/0.jpg", "cat/00.jpg", "cat/9.jpg"]
    assert note["num_samples"] == 9 and note["samples_per_class"] == [4, 5]
    assert names_of(out) == CLASSES_NAMES
    assert to_ffcv.main(["--verify", str(out)]) == 0


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("text")
    assert "not an image" in refused(tmp_path / "in", tmp_path / "out.beton", "--skip-unreadable")
    assert leftovers(tmp_path) == ["in"]


def in_worker(monkeypatch: pytest.MonkeyPatch, action: object, *, at: int = 7) -> None:
    """Let the worker that reads picture ``at`` do ``action`` first."""
    decode = beton_writer.decode_rgb
    marked = file_bytes(picture(at))

    def replaced(data: bytes, *arguments: object, **options: object) -> np.ndarray:
        if data == marked:
            action()
        return decode(data, *arguments, **options)

    monkeypatch.setattr(beton_writer, "decode_rgb", replaced)


def shared_memory_segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")} if os.path.isdir("/dev/shm") else set()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_ends_the_conversion(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    before = shared_memory_segments()
    in_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "killed by SIGKILL" in refused(classes, tmp_path / "out.beton", "--workers", workers)
    assert leftovers(tmp_path) == ["in"]
    assert shared_memory_segments() <= before


def test_an_error_in_a_worker_is_told(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such luck")

    in_worker(monkeypatch, fail)
    assert "no such luck" in refused(classes, tmp_path / "out.beton", "--workers", 2)
    assert leftovers(tmp_path) == ["in"]


def test_a_full_disk_is_one_sentence(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(allocator: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(beton_writer.MemoryAllocator, "flush_page", no_space)
    assert "No space left on device" in refused(classes, tmp_path / "out.beton", "--workers", 2)
    assert leftovers(tmp_path) == ["in"]


def test_too_little_space_is_refused_before_the_start(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_ffcv.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert "are needed" in refused(classes, tmp_path / "out.beton")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_cleans_up(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def interrupt_parent() -> None:
        os.kill(os.getppid(), number)
        time.sleep(60)

    in_worker(monkeypatch, interrupt_parent)
    started = time.monotonic()
    assert convert(classes, tmp_path / "out.beton", "--workers", 2) == code
    assert time.monotonic() - started < 30
    assert leftovers(tmp_path) == ["in"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_hang_up_that_is_ignored_stays_ignored(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        in_worker(monkeypatch, lambda: os.kill(os.getppid(), signal.SIGHUP))
        assert convert(classes, tmp_path / "out.beton", "--workers", 2) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_that_another_thread_receives_while_forking(classes: Path, tmp_path: Path) -> None:
    """Python runs the handler in the main thread, inside fork, whose callbacks swallow what it raises."""

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        signal.raise_signal(signal.SIGTERM)

    def while_forking() -> None:
        if pending:
            thread = threading.Thread(target=pending.pop())
            thread.start()
            thread.join()

    pending = [receive]
    os.register_at_fork(after_in_parent=while_forking)  # stays registered, and does nothing more
    assert convert(classes, tmp_path / "out.beton", "--workers", 2) == 143
    assert leftovers(tmp_path) == ["in"]
    assert multiprocessing.active_children() == []


def test_verify_finds_damage(classes: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.beton"
    assert convert(classes, out) == 0
    reader, data = stored(out)
    start = int(reader.metadata["f0"]["data_ptr"][4])
    whole = bytearray(out.read_bytes())
    whole[start + len(data[4]) // 2 : start + len(data[4])] = bytes(len(data[4]) - len(data[4]) // 2)
    out.write_bytes(whole)
    capfd.readouterr()
    assert to_ffcv.main(["--verify", str(out)]) == 2
    shown = capfd.readouterr().out
    assert "bad sample 4" in shown and "1 of 9 samples" in shown and "checksum" in shown
    other = tmp_path / "other.beton"
    other.write_bytes(out.read_bytes())
    assert to_ffcv.main(["--verify", str(tmp_path / "*.beton")]) == 2
    shown = capfd.readouterr().out
    assert all(f"{path}: 1 of 9 samples are damaged" in shown for path in (out, other))
    Path(f"{out}.json").unlink()
    assert to_ffcv.main(["--verify", str(out)]) == 2
    out.write_bytes(whole[:5_000_000])
    assert "not a whole" in refused("--verify", out) or to_ffcv.main(["--verify", str(out)]) == 2


def test_verify_refuses_what_is_no_beton(tmp_path: Path) -> None:
    (tmp_path / "text.beton").write_text("no beton at all")
    assert "not a whole .beton" in refused("--verify", tmp_path / "text.beton")
    assert "no file" in refused("--verify", tmp_path / "missing.beton")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/in/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(file_bytes(picture(0)))
    assert convert(tmp_path / "in", tmp_path / "out.beton") == 0
    assert os.fsencode(note_of(tmp_path / "out.beton")["class_names"][0]) == b"caf\xe9"


def test_packed_names() -> None:
    names = ["", "a", "ünï", "", "longer name"]
    packed = PackedNames(names)
    assert [packed[index] for index in range(len(packed))] == names
    assert [packed.take(np.array([4, 1]))[index] for index in range(2)] == ["longer name", "a"]
