"""How far a long command is: how much is done, how fast, and the time left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

LINE_SECONDS, TTY_SECONDS = 5.0, 0.5


class Progress:
    """A line that is rewritten on a terminal, a line every five seconds in a log, both on stderr.

    Args:
        total: how much there is to do.
        what: in which unit, plural ("images").
        name: of the work, where several go on one after the other ("features of train").
        enabled: false on every process but the main one: nothing is written.
        after: the work before this one: many short works one after the other have a line every five seconds, too.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        *,
        what: str = "images",
        name: str = "",
        enabled: bool = True,
        after: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.name, self.enabled = total, what, name, enabled
        self._clock, self._tty = clock, sys.stderr.isatty()
        self._began = clock()
        self._shown: float = self._began if after is None else after._shown
        self._written = False

    def show(self, count: int, note: str = "") -> None:
        """Say that ``count`` is done, if it is time for a line; ``note`` says what else there is to know."""
        if self._clock() - self._shown >= (TTY_SECONDS if self._tty else LINE_SECONDS):
            self._write(count, note)

    def end(self, count: int, note: str = "") -> None:
        """Say how it ended, where it took long enough for a line before."""
        if self._written:
            self._write(count, note)
            if self._tty and self.enabled:
                print(file=sys.stderr, flush=True)

    def rate(self, count: int) -> float:
        """How much was done in a second, pauses left out."""
        return count / max(self._clock() - self._began, 1e-9)

    def _write(self, count: int, note: str) -> None:
        self._shown, self._written = self._clock(), True
        rate = self.rate(count)
        parts = [f"{count:,} of {self.total:,} {self.what}", f"{rate:,.0f} {self.what}/s"]
        if 0 < count < self.total:
            parts.append(f"{duration((self.total - count) / rate)} left")
        line = (f"{self.name}: " if self.name else "") + ", ".join([*parts, *([note] if note else [])])
        if self.enabled:
            print(f"\r{line:<79}" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``95400`` -> ``1d 02h 30m``; ``02h 30m`` below a day, ``30m 00s`` below an hour."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h {minute:02d}m"
    return f"{hour:02d}h {minute:02d}m" if hour else f"{minute:02d}m {second:02d}s"
