"""One byte flipped in a checkpoint, of each format and by each reader: refused in a sentence, or without effect."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_rows import Row
from saved_states import OLD, save_as_two, taken, whole

from ijepa_ds.errors import UserError

READERS = {"a resume": taken, "evaluate and export": whole, "format 1": whole}


def flipped(source: Path, folder: Path, generator: random.Random) -> Path:
    """A copy in which one bit, or one byte, of one file is another."""
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / source.name
    shutil.copytree(source, path)
    file = generator.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    # Half of them in the head, which is small beside the tensors of a true checkpoint.
    place = generator.randrange(min(len(content), generator.choice((2000, len(content)))))
    content[place] ^= generator.choice((1 << generator.randrange(8), generator.randrange(1, 256)))
    file.write_bytes(content)
    return path


def outcome_of(path: Path, read: Callable[[Path], dict[str, torch.Tensor]], good: dict[str, torch.Tensor]) -> str:
    """What reading a damaged checkpoint comes to; a byte that changes nothing that is read is survived."""
    try:
        found = read(path)
    except UserError as error:
        return "refused" if "\n" not in str(error) and str(path) in str(error) else "traceback"
    except Exception:
        return "traceback"
    same = found.keys() == good.keys() and all(torch.equal(found[key], good[key]) for key in good)
    return "survived" if same else "silent"


def flip(flips: Row, reader: str, folder: Path, number: int) -> None:
    source = OLD if reader == "format 1" else save_as_two(folder, 8)
    read, generator = READERS[reader], random.Random(0)
    good = read(source)
    for turn in range(number):
        path = flipped(source, folder / "flipped", generator)
        flips.count(outcome_of(path, read, good), f"flip {turn} of random.Random(0)")
    flips.hold(number)
    # Of format 2 each byte counts; a zip archive has bytes that mean nothing.
    assert reader == "format 1" or not flips.counts["survived"]


@pytest.mark.parametrize(("reader", "number"), [("a resume", 100), ("evaluate and export", 100), ("format 1", 30)])
def test_no_flipped_byte_is_silent(row: Callable[[str], Row], tmp_path: Path, reader: str, number: int) -> None:
    flip(row(f"a byte flipped in a checkpoint, {reader}"), reader, tmp_path, number)


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_five_hundred_flipped_bytes(row: Callable[[str], Row], tmp_path: Path, reader: str) -> None:
    flip(row(f"a byte flipped in a checkpoint, {reader}"), reader, tmp_path, 500)
