"""One byte flipped in a .beton: in its images, its metadata or its other tables.

A run looks at all that is no image when it starts; ``to_ffcv.py --verify`` looks at everything.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fault_rows import Row
from ffcv.libffcv import imdecode
from ffcv.reader import Reader
from PIL import Image

from data_prep import to_ffcv
from data_prep.beton_check import Samples
from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.errors import UserError

NUM_IMAGES = 12
AREAS = ("images", "metadata", "tables")


def make_beton(folder: Path) -> Path:
    """JPEGs and raw images of two classes, as the converter writes them."""
    for number in range(NUM_IMAGES):
        colours = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / "in" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    options = ["--write-mode", "proportion", "--workers", "1"]
    assert to_ffcv.main([str(folder / "in"), str(folder / "out.beton"), *options]) == 0
    return folder / "out.beton"


@dataclass(frozen=True)
class Layout:
    """Where a .beton has what: the places of each area's bytes, and the sample of each byte of an image."""

    places: dict[str, list[int]]
    sample_at: dict[int, int]


def layout_of(path: Path) -> Layout:
    reader = Reader(str(path))
    first_of, sample_at = dict(zip(reader.metadata["f0"]["data_ptr"].tolist(), range(NUM_IMAGES), strict=True)), {}
    for row in reader.alloc_table:
        start = int(row["ptr"])
        sample_at |= dict.fromkeys(range(start, start + int(row["size"])), first_of[start])
    content = path.read_bytes()
    metadata = content.index(reader.metadata.tobytes())
    allocation = content.index(reader.alloc_table.tobytes())
    heads = reader.header.nbytes + reader.field_descriptors.nbytes
    places = {
        "images": sorted(sample_at),
        "metadata": list(range(metadata, metadata + reader.metadata.nbytes)),
        "tables": [*range(heads), *range(allocation, allocation + reader.alloc_table.nbytes)],
    }
    return Layout(places, sample_at)


def verified(path: Path) -> tuple[int, str]:
    """Exit code and output of ``--verify``."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = to_ffcv.main(["--verify", str(path)])
    return code, told.getvalue()


def outcome_of(path: Path, area: str, sample: int | None) -> str:
    """What becomes of a flip, in ``sample`` if it is one of an image's bytes."""
    try:
        inspect_dataset(path)
        if area != "images":
            return "silent"  # a run would start
        code, told = verified(path)
    except UserError as error:
        return "refused" if "\n" not in str(error) and path.name in str(error) else "traceback"
    except Exception:
        return "traceback"
    return "refused" if code == 2 and f"bad sample {sample}: " in told and told.count("bad sample") == 1 else "silent"


def looks_the_same(path: Path, sample: int, decoded: np.ndarray) -> str:
    """What a run without checksums makes of an image: "same", "refused", or other pixels."""
    samples = Samples(Reader(str(path)), str(path))
    pixels = pixels_of(samples, sample)
    return "refused" if pixels is None else "same" if np.array_equal(pixels, decoded) else "other"


def pixels_of(samples: Samples, sample: int) -> np.ndarray | None:
    descriptor = os.open(samples.path, os.O_RDONLY)
    try:
        image = samples.stored(descriptor, sample)
    finally:
        os.close(descriptor)
    return decode(image.payload, image.mode, image.height, image.width)


def decode(payload: np.ndarray, mode: int, height: int, width: int) -> np.ndarray | None:
    if mode != 0:
        return payload
    pixels = np.empty((height, width, 3), np.uint8)
    return None if imdecode(payload, pixels, height, width, height, width, 0, 0, 1, 1, False, False) else pixels


def flip(row: Callable[[str], Row], folder: Path, number: int) -> None:
    source = make_beton(folder)
    layout, content = layout_of(source), source.read_bytes()
    whole = Samples(Reader(str(source)), str(source))
    decoded = [pixels_of(whole, sample) for sample in range(NUM_IMAGES)]
    assert verified(source)[0] == 0
    generator = random.Random(0)
    for area in AREAS:
        flips = row(f"a byte flipped in a .beton, in its {area}")
        tried = number // 3 + (area == "images") * (number % 3)
        for turn in range(tried):
            place = generator.choice(layout.places[area])
            other = bytearray(content)
            other[place] ^= generator.choice((1 << generator.randrange(8), generator.randrange(1, 256)))
            source.write_bytes(other)
            sample = layout.sample_at.get(place)
            flips.count(outcome_of(source, area, sample), f"flip {turn} of random.Random(0)")
            if sample is not None:
                seen = looks_the_same(source, sample, decoded[sample])  # type: ignore[arg-type]
                name = "of these other pixels that a decoder alone does not see"
                flips.figures[name] = flips.figures.get(name, 0) + (seen == "other")
        flips.hold(tried)


def test_no_flipped_byte_is_silent(row: Callable[[str], Row], tmp_path: Path) -> None:
    flip(row, tmp_path, 30)


@pytest.mark.long
def test_five_hundred_flipped_bytes(row: Callable[[str], Row], tmp_path: Path) -> None:
    flip(row, tmp_path, 500)


@pytest.mark.long
def test_a_file_that_ends_early_is_refused(row: Callable[[str], Row], tmp_path: Path) -> None:
    source, cuts, generator = make_beton(tmp_path), row("a .beton that was cut"), random.Random(0)
    content = source.read_bytes()
    for turn in range(50):
        source.write_bytes(content[: generator.randrange(len(content))])
        outcome = outcome_of(source, "tables", None)
        cuts.count(outcome, f"cut {turn} of random.Random(0)")
    cuts.hold(50)


def test_what_lies_beside_a_beton_is_missed_and_an_earlier_versions_is_enough(tmp_path: Path) -> None:
    source = make_beton(tmp_path)
    checksums, note = Path(f"{source}.crc32"), Path(f"{source}.json")
    content = checksums.read_bytes()
    for damaged, told in ((content[:-1], "is not what was written"), (None, "cannot be read (No such file")):
        checksums.unlink() if damaged is None else checksums.write_bytes(damaged)
        code, said = verified(source)
        assert code == 2 and told in said and "copy that file again" in said
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "checksums"}))
    inspect_dataset(source)
    code, said = verified(source)
    assert code == 0 and "is of an earlier version, without a checksum of each image" in said
    note.unlink()
    inspect_dataset(source)
    assert "is missing, so checksums are not compared" in verified(source)[1]
