"""The lock on a run folder: who has it, and that nothing but the process itself keeps it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ijepa_ds.errors import UserError
from ijepa_ds.meeting import node_name
from ijepa_ds.run.lock import LOCK, hold, release


def start(folder: Path) -> tuple[int, list[int]]:
    """A process that holds a folder, and its children: one forked, one of another program with all open files."""
    told, tell = os.pipe()
    if (process := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            hold(folder)
            program = subprocess.Popen(["sleep", "60"], close_fds=False)
            if (forked := os.fork()) == 0:
                time.sleep(60)
            os.write(tell, f"{program.pid} {forked}".encode())
            time.sleep(60)
        os._exit(1)
    os.close(tell)
    children = list(map(int, os.read(told, 100).split()))
    os.close(told)
    return process, children


def test_a_second_process_is_refused_until_the_first_is_killed_whatever_its_children_do(tmp_path):
    folder = tmp_path / "runs" / "one"
    process, children = start(folder)
    try:
        with pytest.raises(UserError) as refused:
            hold(folder)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        hold(folder)
        release(folder)
        assert all(Path(f"/proc/{child}").exists() for child in children) and len(children) == 2
    finally:
        for pid in (process, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert re.fullmatch(
        rf"{folder} has a run in it already: process {process} on {re.escape(node_name())}, since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it ends, stop it, or choose another ijepa.run.name",
        str(refused.value),
    )


def test_a_process_may_hold_its_folder_twice_and_gives_it_back_without_a_trace(tmp_path):
    hold(tmp_path)
    hold(tmp_path)
    said = json.loads((tmp_path / LOCK).read_text())
    assert said["pid"] == os.getpid() and said["host"] == node_name()
    release(tmp_path)
    release(tmp_path)
    assert not list(tmp_path.iterdir())


def refused_by(monkeypatch, number: int) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", "which has not said yet where; wait"),
        (b"null", "which has not said yet where"),
        (b'{"host": "a\\nb", "pid": 1, "since": "x"}', "which has not said yet where"),
        (b'{"host": "x", "pid": ' + b"9" * 3000 + b', "since": "x"}', "which has not said yet where"),
        (b'{"host": "far", "pid": 7, "since": "2026-01-01 00:00:00"}', "process 7 on far, since 2026-01-01 00:00:00;"),
    ],
)
def test_what_a_holder_has_said_is_data(tmp_path, monkeypatch, said, expected):
    (tmp_path / LOCK).write_bytes(said)
    refused_by(monkeypatch, errno.EACCES)
    with pytest.raises(UserError) as refused:
        hold(tmp_path)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_of_another_machine_it_is_said_how_to_go_on_when_it_is_dead(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text('{"host": "far", "pid": 7, "since": "2026-01-01 00:00:00"}')
    (tmp_path / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "metrics.jsonl", (10**9, 10**9))
    refused_by(monkeypatch, errno.EAGAIN)
    with pytest.raises(UserError, match=r"is dead .*, remove .*/run.lock \(its last log line is of 2001-09-09 "):
        hold(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_one_line_says_so(tmp_path, monkeypatch, capsys, number):
    refused_by(monkeypatch, number)
    hold(tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith(f"warning: {tmp_path} is on a file system without locks (") and printed.count("\n") == 1
    release(tmp_path)


def test_a_removed_file_is_not_what_is_locked(tmp_path, monkeypatch):
    lockf, removed = fcntl.lockf, []

    def remove_first(descriptor: int, how: int) -> None:
        lockf(descriptor, how)
        if not removed:
            removed.append((tmp_path / LOCK).unlink())

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    hold(tmp_path)
    assert removed and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    release(tmp_path)


@pytest.mark.parametrize("make", ["folder", "link", "pipe"])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    path = tmp_path / LOCK
    {"folder": path.mkdir, "link": lambda: path.symlink_to(victim), "pipe": lambda: os.mkfifo(path)}[make]()
    with pytest.raises(UserError, match=LOCK):
        hold(tmp_path)
    assert victim.read_text() == "kept"
