"""A rank's file of a checkpoint: slices of tensors with a checksum each, and whose they are.

Format 2 is a ``.safetensors`` file, which other tools open too: nothing in it is ever executed. Its metadata holds one
text, the :class:`Contents`. Every byte is covered: the tensors by their own checksums, the head by one in state.json.
Format 1, which earlier versions wrote with ``torch.save``, is read; its checksums are those of its zip archive.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.files import write_synced
from ijepa_ds.validation import Checked, Count, check, parse_json

FORMAT = 2
SUFFIXES = {1: ".pt", 2: ".safetensors"}
LARGEST_HEAD = 100_000_000  # bytes: safetensors' own limit
# Threads that sum: fewer where others have a use for the cores.
CRC_THREADS: ContextVar[int] = ContextVar("crc_threads", default=4)
Slices = dict[str, dict[str, tuple[int, Tensor]]]  # kind -> parameter -> (first element, fp32 values)

Size = Annotated[int, Field(ge=0, le=2**53)]
Crc = Annotated[str, Field(pattern="^[0-9a-f]{8}$")]


class Damaged(UserError):
    """A checkpoint that is not what was written; ``what``: a clause that names the file and what is wrong with it."""

    def __init__(self, checkpoint: Path, what: str) -> None:
        super().__init__(checkpoint, what)  # as it is: the ranks send it to each other
        self.checkpoint, self.what = checkpoint, what

    def __str__(self) -> str:
        run = self.checkpoint.absolute().parent.parent
        return f"{self.what}; take another one: python -m ijepa_ds checkpoints {run} --verify says which are whole"


class FileRecord(Checked):
    """What state.json says of a rank's file."""

    bytes: Size
    head: Crc  # of all before the tensors


class SliceRecord(Checked):
    """Where a slice begins in the flat parameter, and the CRC-32 of its bytes."""

    first: Size
    crc32: Crc


class Contents(Checked):
    """What a rank's file says of itself."""

    format: Literal[2] = 2
    step: Size
    rank: Size
    processes: Count
    layout: str  # "zero", "stages" or "plain"
    adam_steps: dict[str, Annotated[float, Field(ge=0)]]  # by group
    slices: dict[str, SliceRecord]  # "KIND/PARAMETER"


class _Entry(Checked):
    """safetensors' own record of a tensor; offsets are counted from the end of the head."""

    dtype: Literal["F32"]
    shape: Annotated[list[Size], Field(min_length=1, max_length=1)]
    data_offsets: Annotated[list[Size], Field(min_length=2, max_length=2)]


class _Head(Checked):
    tensors: dict[str, _Entry]
    metadata: dict[str, str]


def rank_file(rank: int, file_format: int = FORMAT) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}{SUFFIXES[file_format]}"


def crc32(content: Any) -> str:
    """The CRC-32 of bytes, as 8 hexadecimal digits: any change within 32 bits is seen, others all but 1 in 4e9."""
    return f"{zlib.crc32(content):08x}"


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no value is NaN or infinite; waits for each device once, and needs no memory there."""
    ends: dict[torch.device, list[Tensor]] = {}
    for values in tensors:
        if values.numel():
            ends.setdefault(values.device, []).extend(torch.aminmax(values))  # NaN if any value is
    return all(bool(torch.isfinite(torch.stack(found)).all()) for found in ends.values())


def write_rank_file(path: Path, tensors: Slices, contents: Contents) -> FileRecord:
    """Write slices and ``contents``, to which their checksums are added, and bring them to the disk; or OSError."""
    flat = {f"{kind}/{name}": held for kind, slices in tensors.items() for name, held in slices.items()}
    raw = {key: values.numpy().view(np.uint8).data for key, (_, values) in flat.items()}
    with ThreadPoolExecutor(
        CRC_THREADS.get()
    ) as pool:  # the sums hold no lock, and one thread is slower than a good disk
        sums = dict(zip(raw, pool.map(crc32, raw.values()), strict=True))
    slices = {key: SliceRecord(first=first, crc32=sums[key]) for key, (first, _) in flat.items()}
    said = contents.model_copy(update={"slices": slices}).model_dump_json()
    head: dict[str, Any] = {"__metadata__": {"format": "pt", "ijepa_ds": said}}
    end = 0
    for key, (_, values) in flat.items():
        begin, end = end, end + raw[key].nbytes
        head[key] = {"dtype": "F32", "shape": [values.numel()], "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    text = len(text).to_bytes(8, "little") + text

    def write(file: BinaryIO) -> None:
        file.write(text)
        for values in raw.values():
            file.write(values)

    write_synced(path, write)
    return FileRecord(bytes=len(text) + end, head=crc32(text))


@dataclass(frozen=True)
class RankFile:
    """A file that was opened: its head is read and checked, its tensors are not.

    ``extents``: kind -> parameter -> (first element, number of elements). ``values``: (kind, parameter) -> the fp32
    values, checked; raises ValueError with what is wrong.
    """

    path: Path
    extents: dict[str, dict[str, tuple[int, int]]]
    adam_steps: dict[str, float]
    values: Callable[[str, str], Tensor]

    def read(self, kind: str, name: str) -> Tensor:
        """The slice of a parameter, fp32 on the CPU: as it was written, and finite; else :class:`Damaged`."""
        try:
            values = self.values(kind, name)
            if not all_finite([values]):
                raise ValueError(f"{kind} {name} holds NaN or infinity")
        except (OSError, ValueError) as error:
            raise _damaged(self.path, error) from None
        return values


def open_rank_file(path: Path, record: FileRecord, *, step: int, rank: int, processes: int) -> RankFile:
    """Read the head of a file of format 2: it must be the one that ``record`` is of."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            text = file.read(8 + min(length, LARGEST_HEAD))
        if foreign := _foreign(text[8:], step, rank, processes):
            raise ValueError(foreign)
        if size != record.bytes:
            raise ValueError(f"it has {size:,} bytes, {record.bytes:,} were written")
        if crc32(text) != record.head:
            raise ValueError("its head is not what was written: its checksum differs")
        tensors, contents = _parse(text[8:])
        extents, offsets = _extents(tensors, contents, size - len(text))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None

    def values(kind: str, name: str) -> Tensor:
        key = f"{kind}/{name}"
        array = np.empty(extents[kind][name][1], np.float32)
        raw = array.view(np.uint8).data
        with open(path, "rb") as file:
            file.seek(len(text) + offsets[key])
            read = file.readinto(raw)
        if read != raw.nbytes or crc32(raw) != contents.slices[key].crc32:
            raise ValueError(f"{kind} {name} is not what was written: its checksum differs")
        return torch.from_numpy(array)

    return RankFile(path, extents, contents.adam_steps, values)


def open_old_rank_file(path: Path) -> RankFile:
    """Read the pickle of a file of format 1, without executing anything in it; all its checksums at the first slice."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)  # compares its checksum
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        adam_steps = {str(group): float(steps) for group, steps in content.pop("adam_steps").items()}
        extents = {kind: {str(n): _old_extent(*held) for n, held in part.items()} for kind, part in content.items()}
    except MemoryError:
        raise
    except Exception as error:  # whatever torch's parser meets in a damaged file; it knows no type of its own for it
        raise _damaged(path, error) from None
    intact: list[bool] = []

    def values(kind: str, name: str) -> Tensor:
        if not intact:
            try:
                with zipfile.ZipFile(path) as archive:
                    bad = archive.testzip()
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
                raise ValueError(str(error)) from None
            if bad is not None:
                raise ValueError(f"the checksum of {bad} differs")
            intact.append(True)
        return content[kind][name][1]

    return RankFile(path, extents, adam_steps, values)


def _old_extent(first: Any, values: Any) -> tuple[int, int]:
    """(first element, number of elements) of a slice of format 1."""
    if type(first) is not int or type(values) is not Tensor or values.dtype != torch.float32 or values.dim() != 1:
        raise ValueError("it holds something else than slices of fp32 parameters")
    return first, len(values)


def _parse(text: bytes) -> tuple[dict[str, _Entry], Contents]:
    """The head of a file, or ValueError."""
    raw = parse_json(text)
    metadata = raw.pop("__metadata__", None) if isinstance(raw, dict) else None
    head, problems = check(_Head, {"tensors": raw, "metadata": metadata})
    if head is None:
        raise ValueError(problems[0])
    contents, problems = check(Contents, parse_json(head.metadata.get("ijepa_ds", "null")))
    if contents is None:
        raise ValueError(problems[0])
    return head.tensors, contents


def _foreign(text: bytes, step: int, rank: int, processes: int) -> str | None:
    """What to say of a head that is of another file than it should be; None where it is not, or cannot be read."""
    try:
        of = _parse(text)[1]
    except (ValueError, RecursionError):
        return None
    if (of.step, of.rank, of.processes) == (step, rank, processes):
        return None
    return (
        f"it is of step {of.step}, rank {of.rank} of {of.processes}, where step {step}, rank {rank} of {processes} "
        "belongs"
    )


def _extents(
    tensors: dict[str, _Entry], contents: Contents, size: int
) -> tuple[dict[str, dict[str, tuple[int, int]]], dict[str, int]]:
    """(extents, offsets) of the slices in ``size`` bytes."""
    extents: dict[str, dict[str, tuple[int, int]]] = {}
    for key, entry in tensors.items():
        (begin, end), kind, name = entry.data_offsets, *key.partition("/")[::2]
        if key not in contents.slices or end - begin != 4 * entry.shape[0] or end > size:
            raise ValueError(f"{key} is not where it should be")
        extents.setdefault(kind, {})[name] = contents.slices[key].first, entry.shape[0]
    return extents, {key: entry.data_offsets[0] for key, entry in tensors.items()}


def _damaged(path: Path, error: BaseException) -> Damaged:
    if isinstance(error, FileNotFoundError):
        return Damaged(path.parent, f"{path} is missing")
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    return Damaged(path.parent, f"{path} is damaged ({reason.split('. ')[0][:300]})")
