"""What this process's main thread is doing, since when, and how long that may take: noted here, watched by another.

Whoever does something slow says so (:func:`doing`); :mod:`ijepa_ds.run.heartbeat` looks at it from a thread of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Seconds that the processes wait for each other in a step: DeepSpeed's limit, in minutes; see ijepa_ds.launch.
_minutes = os.environ.get("DEEPSPEED_TIMEOUT", "")
STEP_SECONDS = 60.0 * int(_minutes if _minutes.isdecimal() else "10")
# Seconds of what takes longer on one process than on others: what rank 0 does alone, a save, compilation.
LONG_SECONDS = max(1800.0, STEP_SECONDS)


@dataclass(frozen=True)
class Activity:
    """One thing that is done.

    Args:
        what: in words: "saving a checkpoint".
        since: when it began, or last got on; of ``time.monotonic``.
        limit: seconds that it may take.
        own: whether no other process can hold it up, such as a read: it is then judged for itself.
        detail: more words, asked for when they are needed; "" where there are none.
    """

    what: str
    since: float
    limit: float = STEP_SECONDS
    own: bool = False
    detail: Callable[[], str] | None = None

    def describe(self) -> str:
        """In words, with the detail."""
        detail = self.detail() if self.detail is not None else ""
        return f"{self.what} {detail}".rstrip()


@dataclass
class _Now:
    activity: Activity
    steps: int = 0


_now = _Now(Activity("starting", time.monotonic(), LONG_SECONDS))


def current() -> tuple[Activity, int]:
    """What is being done, and how many optimizer steps have been."""
    return _now.activity, _now.steps


def steps_done(steps: int) -> None:
    """From here on the main thread is in a step, after so many."""
    _now.steps = steps
    _now.activity = Activity("in a step", time.monotonic())


@contextlib.contextmanager
def doing(
    what: str, *, limit: float = STEP_SECONDS, own: bool = False, detail: Callable[[], str] | None = None
) -> Iterator[None]:
    """Note that ``what`` is done inside; of other threads than the main one nothing is noted. See :class:`Activity`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _now.activity
    _now.activity = Activity(what, time.monotonic(), limit, own, detail)
    try:
        yield
    finally:
        _now.activity = dataclasses.replace(before, since=time.monotonic())
