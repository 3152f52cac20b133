"""Damaged and hostile images through the converter: each is kept or listed with its reason, and the rest stays."""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_rows import Row
from PIL import Image

from data_prep import to_ffcv
from data_prep.images import Limits, UnreadableImage, decode_rgb
from ijepa_ds.errors import UserError

FORMATS = {
    "a.jpg": ("JPEG", {"quality": 90}),
    "b.jpg": ("JPEG", {"progressive": True}),
    "a.png": ("PNG", {}),
    "a.gif": ("GIF", {}),
    "a.bmp": ("BMP", {}),
    "a.webp": ("WEBP", {}),
    "a.tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "b.tiff": ("TIFF", {}),
    "a.ppm": ("PPM", {}),
    "a.jp2": ("JPEG2000", {}),
    "a.avif": ("AVIF", {}),
}


def photograph(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def files() -> dict[str, bytes]:
    """A whole image of each format that this Pillow writes, by name."""
    Image.init()
    whole = {}
    for name, (format_, options) in FORMATS.items():
        if format_ in Image.SAVE:
            buffer = io.BytesIO()
            photograph(1).save(buffer, format_, **options)
            whole[name] = buffer.getvalue()
    return whole


# ---------------------------------------------------------------------------------------------------------- on purpose


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, interlaced: bool = False) -> bytes:
    """A PNG of ``rows``, which may be fewer than its header promises; depth and colour type are PNG's."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ten_rows_of(height: int) -> bytes:
    rows = np.asarray(photograph(2, 32, 10))
    return png(32, height, b"".join(b"\0" + row.tobytes() for row in rows))


def short_jpeg() -> bytes:
    """A JPEG whose compressed data ends early, closed properly."""
    whole = files()["a.jpg"]
    return whole[: len(whole) * 2 // 3] + b"\xff\xd9"


def with_jpeg_size(width: int, height: int) -> bytes:
    whole = bytearray(files()["a.jpg"])
    place = whole.index(b"\xff\xc0") + 5
    whole[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(whole)


def with_many_scans() -> bytes:
    """A small progressive JPEG that repeats one of its scans some thousand times."""
    buffer = io.BytesIO()
    photograph(3, 512, 512).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * 2000 + b"\xff\xd9"


def huge_bmp() -> bytes:
    whole = bytearray(files()["a.bmp"])
    whole[18:26] = struct.pack("<ii", 60_000, 60_000)
    return bytes(whole)


def huge_gif() -> bytes:
    whole = bytearray(files()["a.gif"])
    whole[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(whole)


def hostile() -> dict[str, bytes]:
    """Each must be listed as unreadable, by name."""
    return {
        "one row of 170,000,000 pixels.png": png(170_000_000, 1, bytes(1 + 3 * 1_000_000)),
        "4 gigabytes from 467 bytes.png": png(38_000, 38_000, b"", depth=1, colour=0),
        "88 million pixels that are not there.png": png(9_400, 9_400, bytes(100), depth=16, colour=6) + bytes(10),
        "ten rows of a hundred.png": ten_rows_of(100),
        "no row at all.png": png(32, 32, b""),
        "ends early.jpg": short_jpeg(),
        "65,535 x 65,535.jpg": with_jpeg_size(65_535, 65_535),
        "thousands of scans.jpg": with_many_scans(),
        "60,000 x 60,000.bmp": huge_bmp(),
        "65,535 x 65,535.gif": huge_gif(),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "nothing.jpg": b"",
    }


# ---------------------------------------------------------------------------------------------------------- by chance


def mutated(generator: random.Random, whole: dict[str, bytes]) -> tuple[str, bytes]:
    """A file to which something happened."""
    name = generator.choice(sorted(whole))
    content = bytearray(whole[name])
    kind = generator.choice(["flip", "flips", "cut", "hole", "zeros", "twice", "head"])
    place = generator.randrange(len(content))
    if kind in ("flip", "flips", "head"):
        for _ in range({"flip": 1, "flips": 20, "head": 3}[kind]):
            at = generator.randrange(min(64, len(content)) if kind == "head" else len(content))
            content[at] = generator.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "hole":
        del content[place : place + generator.randrange(1, 200)]
    elif kind == "zeros":
        content[place : place + 100] = bytes(min(100, len(content) - place))
    else:
        content[place:place] = content[: generator.randrange(1, 200)]
    return f"{kind} {name}", bytes(content)


def through_the_converter(folder: Path, given: dict[str, bytes], *options: str) -> dict[str, str]:
    """Convert; the files that were left out, with the reason of each."""
    (folder / "in").mkdir()
    for name, content in given.items():
        (folder / "in" / name).write_bytes(content)
    out = folder / "out.beton"
    assert to_ffcv.main([str(folder / "in"), str(out), "--workers", "2", "--skip-unreadable", *options]) == 0
    note = json.loads(Path(f"{out}.json").read_text())
    assert note["num_samples"] + len(note["skipped"]) == len(given)
    assert to_ffcv.main(["--verify", str(out)]) == 0
    return {each["file"]: each["reason"] for each in note["skipped"]}


def peak_memory() -> float:
    """GB of the largest process that has ended so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def attack(row: Callable[[str], Row], folder: Path, number: int) -> None:
    images, generator, whole = row("damaged and hostile images through the converter"), random.Random(0), files()
    must_go, given = hostile(), {}
    for turn in range(number - len(must_go) - len(whole)):
        name, content = mutated(generator, whole)
        given[f"{turn} {name}"] = content
    given |= must_go | whole
    left_out = through_the_converter(folder, given)
    for name in given:
        reason = left_out.get(name)
        if reason is None:
            images.count("silent" if name in must_go else "survived", name)
        elif name in whole:
            images.count("lost", f"{name}: {reason}")
        else:
            images.count("refused" if reason and "\n" not in reason else "traceback", f"{name}: {reason}")
    images.figures["GB of the largest worker"] = peak_memory()
    images.hold(len(given))


@pytest.mark.long
def test_a_thousand_images(row: Callable[[str], Row], tmp_path: Path) -> None:
    attack(row, tmp_path, 1000)
    assert peak_memory() < 2.5


@pytest.mark.parametrize("name", sorted(hostile()))
def test_a_hostile_image_is_unreadable(name: str) -> None:
    with pytest.raises(UnreadableImage) as error:
        decode_rgb(hostile()[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(files()))
def test_a_whole_image_is_kept_and_a_cut_one_is_not(name: str) -> None:
    whole = files()[name]
    assert decode_rgb(whole).shape == (48, 64, 3)
    for share in (0.3, 0.9):
        with pytest.raises(UnreadableImage):
            decode_rgb(whole[: int(share * len(whole))])


def ends_of_pngs() -> Iterator[bytes]:
    """PNGs of each kind without their last rows; black ones, of which made-up pixels are not told by their colour."""
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        row = b"\0" + bytes(32 * channels)
        yield png(32, 20, row * 19, colour=colour)
    yield png(32, 20, (b"\0" + bytes(4)) * 12, depth=1, colour=0)
    yield png(32, 20, (b"\0" + bytes(32 * 3)) * 5, interlaced=True)


def test_a_png_without_its_last_rows_is_unreadable_also_where_it_is_black() -> None:
    for data in ends_of_pngs():
        with pytest.raises(UnreadableImage, match=r"ends before the last|truncated"):
            decode_rgb(data)
    assert not decode_rgb(png(32, 20, (b"\0" + bytes(96)) * 20)).any()  # whole, and as black


def test_limits_are_settings_and_what_is_beyond_them_ends_no_conversion(tmp_path: Path) -> None:
    given = {"small.png": files()["a.png"], "large.png": png(100, 100, (b"\0" + bytes(300)) * 100)}
    left_out = through_the_converter(tmp_path, given, "--max-pixels", "5000")
    assert list(left_out) == ["large.png"] and "--max-pixels" in left_out["large.png"]
    with pytest.raises(UserError, match=r"1 of 2 files could not be read \(listed above\)"):
        to_ffcv.main([str(tmp_path / "in"), str(tmp_path / "2.beton"), "--workers", "1", "--max-pixels", "5000"])


def test_an_image_for_which_the_memory_does_not_suffice_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a worker, while it is decoded and before."""
    from data_prep import beton_writer

    decode = beton_writer.decode_rgb
    given = {name: files()["a.png"] + bytes(number) for number, name in enumerate(("a.png", "b.png", "c.png"))}

    def short(data: bytes, *arguments: object, **options: object) -> np.ndarray:
        if len(data) == len(given["b.png"]):
            raise MemoryError
        return decode(data, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(beton_writer, "decode_rgb", short)
    assert through_the_converter(tmp_path, given) == {"b.png": "there was not enough memory for it"}
    with pytest.raises(UnreadableImage, match="about 842 MiB to decode, more than --max-memory 800"):
        decode_rgb(png(9_400, 9_400, b"", colour=6), Limits(memory=800 << 20))
