"""Files that appear whole or not at all, and checksums of what is there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

PROJECT = Path(__file__).resolve().parents[1]  # the checkout
BLOCK = 1 << 22  # bytes read at a time
SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<index>\d+)-of-(?P<of>\d+)\.beton")


def shard_path(out: str, index: int, of: int) -> str:
    """Where part ``index`` of ``of`` is written: ``train.beton`` becomes ``train-02-of-16.beton``, sorted by name."""
    return f"{out.removesuffix('.beton')}-{index:0{len(str(of))}d}-of-{of}.beton"


@contextlib.contextmanager
def temporary_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Give a name in ``path``'s folder, so that renaming it is atomic; the file is removed unless it was renamed."""
    temporary = Path(f"{os.fspath(path)}.partial-{os.getpid()}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name to write to; what was written there is on disk under ``path`` when the block is left.

    A reader finds the old file or the new one, after a crash too; an error in the block leaves the old one. The folder
    is made.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    sync(Path(path).absolute().parent)


def write_synced(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is on disk afterwards, for a folder that is renamed as a whole."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync(path: str | os.PathLike) -> None:
    """Bring a file's contents, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: str | os.PathLike) -> str:
    """Return the sha256 of a file, or of the names and contents of all files in a folder."""
    root, digest = Path(path), hashlib.sha256()
    for file in sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]:
        if file != root:
            digest.update(str(file.relative_to(root)).encode())
        with open(file, "rb") as content:
            while block := content.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """``size`` bytes at ``offset``, fewer only at the end of the file (one pread may return less than asked)."""
    parts: list[bytes] = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
