"""How far a long command is: images done, images/s, time left."""

from __future__ import annotations

import math
import sys
import time


class Progress:
    """On a terminal a line that is rewritten, in a log a line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.started, self.shown = total, time.monotonic(), time.monotonic()
        self.tty = sys.stderr.isatty()

    def show(self, count: int, *, every: float | None = None) -> None:
        now = time.monotonic()
        if now - self.shown < (every if every is not None else 0.5 if self.tty else 5.0):
            return
        self.shown = now
        rate = count / max(now - self.started, 1e-9)
        left = f", {duration((self.total - count) / rate)} left" if 0 < count < self.total else ""
        line = f"{count:,} of {self.total:,} images, {rate:,.0f} images/s{left}"
        print(f"\r{line:<79}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def end(self, count: int) -> None:
        self.show(count, every=0.0)
        if self.tty:
            print(file=sys.stderr, flush=True)


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
