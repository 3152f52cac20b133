"""One run, one folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ijepa_ds.errors import UserError
from ijepa_ds.meeting import node_name
from ijepa_ds.validation import Checked, check, must, parse_json, reason

LOCK = "run.lock"
_MOST_BYTES = 4096  # of what its holder says in it
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
# (process, lock file) -> descriptor. A process loses a lock of POSIX when it closes the file anywhere, so it opens it
# once; a forked child remembers what is not its own.
_held: dict[tuple[int, Path], int] = {}

_Text = Annotated[str, Field(min_length=1, max_length=255), must(str.isprintable, "must be printable")]


class Holder(Checked):
    """Who holds a lock, as it says itself; ``since``: local time."""

    host: _Text
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    since: _Text


def hold(folder: Path) -> None:
    """Keep other runs out of ``folder``, which is made, until this process ends or calls :func:`release`.

    A record lock of POSIX (fcntl), not flock: the system takes it back with the process, ``kill -9`` included, and no
    child has it, so that a loader or compiler that outlives its run locks nobody out. Over NFS, Lustre, CephFS and the
    like their server keeps it, as far as it is mounted so. Where there are no locks, one line says so.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = (folder / LOCK).absolute()
    if (os.getpid(), path) in _held:
        return
    while True:
        descriptor = _open(path)
        try:
            _lock(descriptor, path)
        except UserError:
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # removed meanwhile
    _held[os.getpid(), path] = descriptor
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    record = Holder(host=node_name(), pid=os.getpid(), since=since).model_dump()
    with contextlib.suppress(OSError):  # a full disk: the lock holds without
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
        os.fsync(descriptor)  # of NFS others see it then, not before it is closed


def release(folder: Path) -> None:
    """Give a lock back that this process holds, if it does, and remove its file."""
    path = (folder / LOCK).absolute()
    if (descriptor := _held.pop((os.getpid(), path), None)) is not None:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Neither what somebody's link points at is written to, nor a pipe waited for.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({path.name}: {reason(error)}); choose another ijepa.run.folder"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no plain file, which a run locks; remove it")
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            raise UserError(_refusal(path, os.pread(descriptor, _MOST_BYTES, 0))) from None
        print(
            f"warning: {path.parent} is on a file system without locks ({reason(error)}): nothing keeps a second run "
            "out of it; take care that none is started there",
            flush=True,
        )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _refusal(path: Path, said: bytes) -> str:
    """What is said to the second: who is there, and the way out where it can be dead nevertheless."""
    folder, cure = path.parent, "wait until it ends, stop it, or choose another ijepa.run.name"
    try:
        holder, _ = check(Holder, parse_json(said))
    except ValueError:
        holder = None
    if holder is None:  # it has only begun, or the disk was full
        return f"{folder} has a run in it already, which has not said yet where; {cure}"
    sentence = f"{folder} has a run in it already: process {holder.pid} on {holder.host}, since {holder.since}; {cure}"
    if holder.host == node_name() and _lives(holder.pid):
        return sentence
    return f"{sentence}. If its machine is dead and the file server has not noticed, remove {path}{_last_line(folder)}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _last_line(folder: Path) -> str:
    """When the log was written last: all that can be known from here of a process on another machine."""
    try:
        written = datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
    except OSError:
        return ""
    return f" (its last log line is of {written.isoformat(sep=' ', timespec='seconds')})"
