"""Commands run one after the other, and the signals that ask for their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType


class Commands:
    """Runs commands in ``folder``, each in a process group of its own; a signal asks the one that runs to stop.

    A pretraining then saves and leaves. A second Ctrl-C kills it. Nothing that a command has started outlives it::

        with Commands(folder, os.environ) as commands:
            code = commands.run(["python", "run.py", ...])
            if commands.stopped:  # the signal
                ...
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.stopped: signal.Signals | None = None
        self._group: int | None = None  # the id of the command, and of the process group that it leads
        self._previous: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> Commands:
        for number in self.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a hang-up is under nohup
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end; returns its exit code, negative where a signal ended it."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._group = process.pid
        if self.stopped:  # while it was started
            self._send(signal.SIGTERM)
        try:
            return process.wait()
        finally:
            self._send(signal.SIGKILL)  # what it has left behind
            self._group = None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self.stopped = self.stopped is not None, signal.Signals(number)
        if again and number == signal.SIGINT:
            self._send(signal.SIGKILL)
        elif self._group is not None:
            print("stopping: a pretraining saves and leaves; Ctrl-C again kills it", file=sys.stderr, flush=True)
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, number)
