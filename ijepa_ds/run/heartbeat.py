"""Nobody waits for the dead: each process gives signs of life, and leaves where another gives none.

Two threads beside the main one, which may be in a collective or in native code. One speaks with the store that rank 0
keeps, on a connection of its own; a request to a process that was stopped never returns. The other asks nobody: it
looks at what the first has heard and since when, and at what the main thread does, and it ends the process where that
is to be done, without waiting for a device or a collective.

Rank 0 reads all beats, every other rank reads rank 0's. For N processes that is 2 N requests every :data:`_INTERVAL`
seconds, of some hundred bytes each; only rank 0's answer grows with N.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from ijepa_ds.activity import current
from ijepa_ds.errors import UserError, report
from ijepa_ds.meeting import Meeting
from ijepa_ds.run.beats import STUCK_FACTOR, Beat, Judge, decode, stuck

GIVEN_UP = 75  # the exit code of who leaves because of another, or stands still: "try again" in sysexits.h
_INTERVAL = 2.0  # seconds from one beat to the next, at most
_GRACE = 4.0  # seconds in which the main thread may say itself why rank 0 has gone
_GOODBYE = 10.0  # seconds that rank 0 waits at the end, for others that still use its store
_OF_A_CONNECTION = re.compile(r"gloo|NCCL|nccl|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe")


class Heartbeat:
    """Inside, this process is watched by all others of ``meeting``, and watches them.

    Whatever ends the block is told to the others: the first error is printed by the process that had it, and each
    other one prints a line with it and leaves with exit code :data:`GIVEN_UP`.

    Args:
        meeting: of the run's processes.
        silence: seconds without a sign of life after which a process counts as dead.
    """

    def __init__(self, meeting: Meeting, silence: float) -> None:
        self.ranks, self.node, self.silence = meeting.ranks, meeting.node, silence
        self.interval = min(_INTERVAL, max(0.2, silence / 30))
        self.judge = Judge(silence, quick=4 * self.interval + 1, own=self.ranks.rank)
        self.failure = ""  # why the run ends: the first that was said
        self._count, self._broken, self._bye, self._begun = 0, False, False, False
        self._own_failure: str | None = None  # what this process gives as the reason, and when it did
        self._told_at, self._posted = 0.0, False
        self._told, self._wake, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._known = threading.Event()  # the first beat has been given: from here on this process is missed
        self._deciding = threading.Event()  # the main thread has had an error, and says itself what comes of it
        self._leaving = threading.Lock()
        self._heard = 0  # rank 0: how many know of the failure
        self._lost: float | None = None  # since when the store is gone
        self._meeting = meeting
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        targets = [self._watch]
        if not self.ranks.alone:
            self._store, self._lifeline = self._meeting.second_line(timeout=10 * self.silence)
            self._lifeline.setblocking(False)
            targets.append(self._exchange)
        for target in targets:
            self._threads.append(threading.Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True))
            self._threads[-1].start()
        if not self.ranks.alone:
            self._known.wait(self.judge.quick)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.ranks.alone:
            if error is None:
                self._bye = True
                self._wake.set()
                self._threads[-1].join(_GOODBYE)
            elif not isinstance(error, SystemExit):  # that is what all have agreed on
                self._fail(error)
        self._stopped.set()
        self._wake.set()
        self._threads[0].join()

    # ------------------------------------------------------------------------------------------------ the main thread

    def _fail(self, error: BaseException) -> NoReturn:
        """Leave, because of what happened here or, where another process has broken off, of what happened there."""
        if _is_of_a_connection(error):
            self._broken = True
            self._wake.set()
            time.sleep(2 * self.judge.quick + _GRACE)  # the other thread ends the process when it knows more
            reason = str(error).strip().splitlines()[0][:300]
            self.tell(f"rank {self.ranks.rank} on {self.node} has lost another process, which still beats: {reason}")
            time.sleep(4 * self.interval)
            self.leave(f"rank {self.ranks.rank} on {self.node} leaves: {reason}")
        self._deciding.set()
        kind, code = f"{type(error).__name__}: ", 1
        if isinstance(error, UserError):
            kind, code = "", 2
        elif isinstance(error, KeyboardInterrupt):
            code = 128 + signal.SIGINT
        own = f"{kind}{str(error).strip()}"
        self.tell(f"rank {self.ranks.rank} on {self.node}: {own}")
        self._told.wait(4 * self.interval)
        first = self.failure or self._own_failure
        if first != self._own_failure:
            same = str(first).partition(": ")[2] == own  # all have it: it is said once
            self.leave(None if same else self._line(), code if same else GIVEN_UP)
        if isinstance(error, UserError):
            report(error)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        self.leave(None, code)

    def tell(self, failure: str) -> None:
        """Have the run end for this reason, unless there is one before it."""
        self._own_failure, self._told_at = failure, time.monotonic()
        self._wake.set()

    def leave(self, line: str | None, code: int = GIVEN_UP) -> NoReturn:
        """End this process at once: no exit handler, which may wait for a device or for others."""
        self._leaving.acquire()  # never released: the second who wants to leave waits for the first
        if line is not None:
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode())  # no buffer, whose lock another thread may hold
        if self.ranks.rank == 0 and not self.ranks.alone:  # the others read in this process's store why the run ends
            end = time.monotonic() + 3 * self.interval + 1
            dead = self.judge.silent(time.monotonic())
            while self._heard < self.ranks.world_size - 1 - len(dead) and time.monotonic() < end:
                self._wake.set()
                time.sleep(0.05)
        os._exit(code)

    # ------------------------------------------------------------------------------------- the thread that may be held

    def _exchange(self) -> None:
        """Give a sign of life, and read others', until the end."""
        end = None
        while not self._stopped.is_set():
            leaving = self._bye  # before it is told
            try:
                if self._closed():
                    raise dist.DistNetworkError("closed")
                self._talk()
                self._known.set()
            except dist.DistStoreError:  # not answered in time: what follows from it is for the other thread
                pass
            except RuntimeError:
                self._lost = time.monotonic()
                self._known.set()
                return
            if leaving:
                end = end or time.monotonic() + _GOODBYE
                beats = self.judge.beats.items()
                if self.ranks.rank > 0 or all(beat.bye for rank, beat in beats if rank) or time.monotonic() > end:
                    return
            self._wake.wait(0.05 if leaving else self.interval)
            self._wake.clear()

    def _talk(self) -> None:
        store, rank = self._store, self.ranks.rank
        store.set(f"beat_{rank}", self.beat().encode())
        if rank == 0 and not self._begun:
            store.compare_set("failure", "", "")  # so that it can be read
            self._begun = True
        if self._own_failure is not None and not self._posted:
            store.compare_set("failure", "", self._own_failure)
            self._posted = True
        watched = [0] if rank > 0 else range(self.ranks.world_size)
        coming = [r for r in watched if r in self.judge.beats or store.check([f"beat_{r}"])]
        *beats, failure = store.multi_get([*(f"beat_{r}" for r in coming), "failure"])
        self.judge.hear(dict(zip(coming, map(decode, beats), strict=True)), time.monotonic())
        if failure and not self.failure:
            store.add("heard", 1 if rank else 0)
            self.failure = failure.decode()
            self._told.set()
        if self.failure and rank == 0:
            self._heard = store.add("heard", 0)

    def beat(self) -> Beat:
        """Of this process, now."""
        activity, steps = current()
        self._count += 1
        age = time.monotonic() - activity.since
        return Beat(
            count=self._count,
            node=self.node,
            steps=steps,
            what=activity.describe() if activity.own and age > self.silence / 2 else activity.what,
            age=age,
            limit=self._limit(activity.own, activity.limit),
            own=activity.own,
            broken=self._broken,
            bye=self._bye,
        )

    def _limit(self, own: bool, limit: float) -> float:
        return STUCK_FACTOR * self.silence if own else limit

    def _closed(self) -> bool:
        """Whether the store's process has ended."""
        try:
            return self._lifeline.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    # -------------------------------------------------------------------------------------- the thread that asks nobody

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.interval / 4):
            gap, last = time.monotonic() - last, time.monotonic()
            self._look_at_the_main_thread()
            if not (self.ranks.alone or self._deciding.is_set()):
                self._look_at_the_others(gap)

    def _look_at_the_main_thread(self) -> None:
        """What it does alone has a limit of its own; rank 0 reports of all who are slow in it."""
        activity, _ = current()
        if self.ranks.alone:
            self.judge.hear({0: self.beat()}, time.monotonic())
        if self.ranks.rank == 0:
            for line in self.judge.reports():
                with contextlib.suppress(OSError):
                    os.write(2, f"{line}\n".encode())
        if activity.own and time.monotonic() - activity.since > STUCK_FACTOR * self.silence:
            reason = stuck(self.ranks.rank, self.beat())
            if self.ranks.alone:
                self.leave(f"error: {reason}; the same command goes on from the last checkpoint")
            if self._own_failure is None:
                self.tell(reason)

    def _look_at_the_others(self, gap: float) -> None:
        now = time.monotonic()
        if gap > self.silence:
            self.leave(
                f"rank {self.ranks.rank} on {self.node} leaves: it stood still for {gap:.0f} s (was it stopped?), and "
                f"the others wait for {self.silence:.0f} s"
            )
        if self._broken:
            self.judge.break_off(now)
        if not self.failure and not self._bye:
            self._judge(now)
        if not self.failure and self._own_failure is not None and now - self._told_at > self.judge.quick:
            self.failure = self._own_failure  # the store does not answer
        if self.failure:
            self.leave(self._line())

    def _judge(self, now: float) -> None:
        first = self.judge.beats.get(0)
        if self._lost is not None:
            if now - self._lost > _GRACE and not (first is not None and first.bye):
                last = f" on {first.node} was {first.what}, {first.place()}" if first else " had not said anything"
                self.failure = f"rank 0's store is gone; rank 0{last}"
            return
        if verdict := self.judge.verdict(now):
            if self.ranks.rank == 0:
                self.tell(verdict)
            elif self.judge.silent(now):  # rank 0, which cannot be told
                self.failure = verdict

    def _line(self) -> str:
        """What a process says that leaves because of another."""
        reason = self.failure.splitlines()[0]
        return f"rank {self.ranks.rank} on {self.node} leaves ({self.beat()}): {reason}"


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether an error may come from another process's end, rather than be its reason."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _OF_A_CONNECTION.search(str(error)) is not None
