"""Commands in a process group of their own, and the signals that ask for their end.

``deepspeed`` would die of a signal and leave its ranks behind, or kill them before a checkpoint is written. So the
command does not get the signals of its caller: its ranks, the processes that train, are asked to save and leave, and
the launchers above them end by themselves. ``run.sh`` does the same for ``pretrain``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

_GRACE_SECONDS = 60  # for what is left after the command itself has ended


class Commands:
    """Runs commands one after the other; a signal asks the one that runs to stop, a second Ctrl-C kills it.

    ::

        with Commands(folder) as commands:
            code = commands.run(["deepspeed", "run.py", ...])
            if commands.stopped:  # the signal's name
                ...
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.stopped: signal.Signals | None = None
        self._group: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Commands:
        for number in self.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a hang-up is under nohup
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave back
        self._previous = {}

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end, and to the end of every process that it started; returns its exit code."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._group = process.pid
        if self.stopped:  # while it was started
            _ask_to_stop(self._group)
        code = process.wait()
        _end_what_is_left(self._group)
        self._group = None
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self.stopped = self.stopped is not None, signal.Signals(number)
        if self._group is None:
            return
        if again and number == signal.SIGINT:
            _kill(self._group, signal.SIGKILL)
            return
        print("stopping: what trains saves and leaves; Ctrl-C again kills it", file=sys.stderr, flush=True)
        _ask_to_stop(self._group)


def members(group: int) -> dict[int, str]:
    """Command lines of the living processes of a group, by their id. Zombies do not count: nothing may collect them."""
    lines = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
            state, _, process_group = (folder / "stat").read_text().rpartition(") ")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                lines[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return lines


def _ask_to_stop(group: int) -> None:
    """SIGTERM to the ranks, or to all where there are none: the command has no launcher, or has not started them."""
    ranks = [process for process, line in members(group).items() if "--local_rank=" in line]
    if not ranks:
        _kill(group, signal.SIGTERM)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)


def _end_what_is_left(group: int) -> None:
    """Ranks whose launcher was killed would go on alone, holding the GPUs."""
    deadline = time.monotonic() + _GRACE_SECONDS
    if members(group):
        _kill(group, signal.SIGTERM)
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    if members(group):
        _kill(group, signal.SIGKILL)


def _kill(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
