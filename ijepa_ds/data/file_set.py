"""Which files a set of images consists of, and whether they belong together: by their names and their notes.

A note is FILE.beton.json, which data_prep/to_ffcv.py writes. A file without one is taken as it is.
"""

from __future__ import annotations

import glob
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ijepa_ds.errors import UserError, some
from ijepa_ds.files import SHARD_NAME
from ijepa_ds.validation import Checked, check, load_json, must, reason

Paths = str | os.PathLike | Sequence[str | os.PathLike]  # one file, a pattern with *, or a list of both
_CONVERT = "python data_prep/to_ffcv.py SOURCE"


@dataclass(frozen=True)
class Shard:
    """Which part of a conversion a file is: number ``index`` of ``of``, from 1 on."""

    path: str
    stem: str  # the path up to the numbers
    index: int
    of: int
    listing: str | None  # what the whole conversion's images were, as a checksum; None where no note tells it


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


class _Part(Checked):
    """Which part of a conversion, as its note says."""

    model_config = ConfigDict(extra="ignore")

    index: Annotated[int, Field(ge=1, le=100_000)]
    of: Annotated[int, Field(ge=1, le=100_000)]
    listing: str


class _Checksums(Checked):
    """CRC-32 of parts of a .beton, as 8 hexadecimal digits; see ijepa_ds.data.beton_checksums."""

    model_config = ConfigDict(extra="ignore")

    tables: str
    images: str


class _Note(Checked):
    """A note, as far as its kinds matter."""

    model_config = ConfigDict(extra="ignore")

    # Not list[str]: names of folders need not be UTF-8.
    class_names: Annotated[Any, must(_are_names, "must be a list of names")] = Field(default=[])
    shard: _Part | None = None
    bytes: int | None = None
    sha256: str | None = None
    checksums: _Checksums | None = None


def files_of(paths: Paths) -> list[str]:
    """The files that ``paths`` name, in order; a pattern's are sorted by name.

    Raises:
        UserError: a pattern matches nothing, nothing is named, or one file twice.
    """
    files = [file for one in _given(paths) for file in _expanded(one)]
    if not files:
        raise UserError(f"an empty list names no images: give a .beton file; make one with: {_CONVERT} FILE.beton")
    seen: dict[Any, str] = {}
    for file in files:
        if os.path.exists(file):
            status = os.stat(file)
            same = status.st_dev, status.st_ino
            if same in seen:
                also = "" if seen[same] == file else f", which is {seen[same]},"
                raise UserError(f"{file}{also} is named twice among the files of one set: name it once")
            seen[same] = file
    return files


def _given(paths: Paths) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def _expanded(path: str) -> list[str]:
    if "*" not in path or os.path.exists(path):
        return [path]
    matches = sorted(match for match in glob.glob(path) if match.endswith(".beton"))
    if not matches:
        raise UserError(f"no .beton file matches {path}; check the pattern, or make them with: {_CONVERT} FILE.beton")
    return matches


def read_note(path: str) -> dict[str, Any]:
    """What data_prep/to_ffcv.py wrote beside a .beton; empty where it did not.

    Raises:
        UserError: it is damaged, or something else.
    """
    file, cure = f"{path}.json", "restore it, or remove it to do without"
    if not os.path.lexists(file):
        return {}
    try:
        raw = load_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}): {cure}") from None
    note, problems = check(_Note, raw)
    if note is None:
        raise UserError(f"{file} is not what data_prep/to_ffcv.py writes ({problems[0]}): {cure}")
    return raw


def check_set(files: Sequence[str], paths: Paths) -> None:
    """Refuse the files of ``paths`` whose notes or names say that they are no set (:class:`UserError`).

    One part of a conversion is a set where it is named itself, and not where it is all that a pattern matches: its
    other parts may be on their way.
    """
    if len(files) == 1 and _given(paths) == list(files):
        return
    notes = {path: read_note(path) for path in files}
    _check_settings(notes)
    check_shards(notes)


def _check_settings(notes: dict[str, dict[str, Any]]) -> None:
    """How images are stored and what their classes are must be the same, as far as notes tell."""
    for key in ("settings", "class_names"):
        having = [(path, note[key]) for path, note in notes.items() if note.get(key)]
        for path, value in having[1:]:
            first, expected = having[0]
            if value != expected:
                differ = _differing(value, expected) if key == "settings" else "the names of the classes"
                raise UserError(
                    f"{first} and {path} were not converted alike ({differ}), so they are no set: convert one of them "
                    f"again with the other's options: {_CONVERT} {path}"
                )


def _differing(here: Any, there: Any) -> str:
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return "settings"
    keys = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    return some(f"{key} {json.dumps(there.get(key))} and {json.dumps(here.get(key))}" for key in keys)


def check_shards(notes: dict[str, dict[str, Any]]) -> None:
    """Parts of one conversion (path -> note) must all be there, from one and the same listing, and in order."""
    shards = [shard for path, note in notes.items() if (shard := _shard_of(path, note))]
    names: dict[tuple[str, int], Shard] = {}
    for shard in shards:
        first = names.setdefault((shard.stem, shard.of), shard)
        if None not in (first.listing, shard.listing) and first.listing != shard.listing:
            raise UserError(
                f"{first.path} and {shard.path} are parts of different conversions, as their sources did not list the "
                f"same images: convert one of them again from the other's source: {_CONVERT} ... --shard "
                f"{shard.index}/{shard.of}"
            )
    conversions: dict[tuple, list[Shard]] = defaultdict(list)
    for shard in shards:
        conversions[shard.listing or shard.stem, shard.of].append(shard)
    for (_, of), parts in conversions.items():
        _check_conversion(parts, of)


def _check_conversion(parts: list[Shard], of: int) -> None:
    indices = [part.index for part in parts]
    missing = [index for index in range(1, of + 1) if index not in indices]
    if missing:
        raise UserError(
            f"{parts[0].path} is one of {of} parts of a conversion, but part {some(missing)} is not among the files: "
            f"add it, or make it with: {_CONVERT} ... --shard {missing[0]}/{of}"
        )
    for index, part in enumerate(parts, 1):
        if part.index != index:
            raise UserError(
                f"{part.path}, which is part {part.index} of {of}, comes as number {index} of these: name the parts "
                "once each and in their order, on which the order of a run depends"
            )


def _shard_of(path: str, note: dict[str, Any]) -> Shard | None:
    match = SHARD_NAME.fullmatch(path)
    if noted := note.get("shard"):
        stem = match["stem"] if match else path
        return Shard(path, stem, noted["index"], noted["of"], noted["listing"])
    return Shard(path, match["stem"], int(match["index"]), int(match["of"]), None) if match else None


def described(paths: Iterable[str]) -> str:
    """Files in a sentence: the only one, or the first and how many more."""
    first, *others = paths
    return first + (f" and {len(others)} more file{'s' * (len(others) > 1)}" if others else "")
