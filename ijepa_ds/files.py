"""Files written whole or not at all, and read with their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]  # the checkout


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then put it in place: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _write(path: Path, write: Callable) -> None:
    with open(path, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch's zip writer covers the disk's own error with one of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """sha256 over a file, or over the names and contents of all files of a checkpoint's folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def pread_fully(descriptor: int, size: int, offset: int) -> bytes:
    """``size`` bytes at ``offset``, fewer only at the end of the file (one pread may return less than asked)."""
    parts: list[bytes] = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def temporary_beside(path: str) -> Iterator[str]:
    """A name in ``path``'s folder, so that renaming it is atomic. The file is removed unless it was renamed."""
    temporary = f"{path}.partial-{os.getpid()}"
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
