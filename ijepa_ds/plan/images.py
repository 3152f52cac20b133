"""The images of a run: how many, how large their file is, and what decoding them takes.

Rates of the loader are those measured in ``benchmarks/results/2026-11-25_loader.json`` on one core of an AMD EPYC (Zen
4), ImageNet JPEGs at quality 90, crops of 0.3 to 1 of the area resized to 224 px; sizes of files are those of
``docs/data.md``.
"""

from __future__ import annotations

import glob
import struct
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from ijepa_ds.errors import some
from ijepa_ds.validation import Checked, Count, Pair, check, load_json

IMAGENET = 1_281_167  # images of its training split
# Longest side of the stored images -> images/s of a core: loader, FFCV's decoder alone.
MEASURED = {256: (2589, 3808), 400: (958, 1912), 512: (748, 1386)}
MEASURED_IN = "benchmarks/results/2026-11-25_loader.json"
STORED_SIDE = 512  # of data_prep/to_ffcv.py, where nothing says otherwise
_BYTES_AT_512 = 65.5e9 / IMAGENET
_HEADER = struct.Struct("<HHIQQ")  # FFCV's: version, fields, page size, samples, where the table of places is
_VERSION = 2
_BUFFERS = 5  # micro-batches for which FFCV keeps room to decode into


class _Sizes(Checked):
    """Least and largest of the stored images, in pixels."""

    height: Pair[Count]
    width: Pair[Count]


class _Note(Checked):
    """Of what data_prep/to_ffcv.py wrote beside a .beton, the part that matters here."""

    model_config = ConfigDict(extra="ignore")

    image_size: _Sizes


@dataclass(frozen=True)
class Images:
    """Of a run. ``told``: where the number comes from."""

    count: int
    bytes: float
    stored_side: int
    told: str
    is_measured: bool  # the bytes are a file's, not ImageNet's in proportion

    @property
    def rates(self) -> tuple[int, int]:
        """Images/s of a core: the loader's and the decoder's, measured at the next longer side, or at the longest."""
        sides = [side for side in MEASURED if side >= self.stored_side] or [max(MEASURED)]
        return MEASURED[min(sides)]

    def scratch(self, images: int) -> float:
        """Bytes that a process decodes ``images`` at once in."""
        return _BUFFERS * images * 3.0 * self.stored_side**2


def images_of(paths: str | list[str], asked: int | None) -> Images:
    """Of the training files where all are there, else so many as were asked for, else ImageNet's."""
    named = paths if isinstance(paths, str) else some(paths, shown=2)
    files = _files([paths] if isinstance(paths, str) else paths)
    counts = [_header(file) for file in files]
    count = sum(number for number in counts if number) if all(counts) else 0
    size, side = sum(map(_size, files)), max([side for file in files if (side := _side(file))], default=STORED_SIDE)
    if asked is not None:
        return Images(asked, asked * (size / count if count else _BYTES_AT_512), side, "--images", False)
    if count:
        return Images(count, size, side, named, True)
    return Images(IMAGENET, IMAGENET * _BYTES_AT_512, STORED_SIDE, f"ImageNet's, since {named} is not here", False)


def _files(paths: list[str]) -> list[Path]:
    """Those that a configuration names, by ``*`` too. As in the data's wing, which imports ffcv and so is not used."""
    names = [sorted(glob.glob(path)) if "*" in path else [path] for path in paths]
    return [Path(name) for of_path in names for name in of_path if name.endswith(".beton") or name in paths]


def _header(path: Path) -> int | None:
    """The number of samples of a .beton, by its first bytes."""
    try:
        with path.open("rb") as file:
            version, _, _, samples, _ = _HEADER.unpack(file.read(_HEADER.size))
    except (OSError, struct.error):
        return None
    return samples if version == _VERSION and samples else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _side(path: Path) -> int | None:
    """The longest side of the stored images, by what data_prep/to_ffcv.py wrote beside them."""
    try:
        note, _ = check(_Note, load_json(f"{path}.json"))
    except (OSError, ValueError):
        return None
    return max(note.image_size.height[1], note.image_size.width[1]) if note else None
