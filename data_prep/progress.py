"""How far a long command is: images done, images/s, time left."""

from __future__ import annotations

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
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return (
        f"{hours} h {minutes % 60} min"
        if hours
        else f"{minutes} min {int(seconds) % 60} s"
        if minutes
        else f"{int(seconds)} s"
    )
