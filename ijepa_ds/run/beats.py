"""What the processes of a run tell each other of themselves every few seconds, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ijepa_ds.errors import some
from ijepa_ds.validation import parse_json

STUCK_FACTOR = 5  # a read is reported after one silence, and ends the run after so many


@dataclass(frozen=True)
class Beat:
    """One process's sign of life.

    Args:
        count: another number than in the one before.
        node: its machine.
        steps: optimizer steps done.
        what: what its main thread does.
        age: seconds since that began, or last got on.
        limit: seconds that it may take.
        own: whether no other process can hold it up.
        broken: whether its connection to another process has broken off.
        bye: whether it has come to its end.
    """

    count: int
    node: str
    steps: int = 0
    what: str = "starting"
    age: float = 0.0
    limit: float = 600.0
    own: bool = False
    broken: bool = False
    bye: bool = False

    def encode(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return f"{self.what} for {self.age:.0f} s, {self.place()}"

    def place(self) -> str:
        """How far it has come."""
        return f"after step {self.steps}" if self.steps else "before its first step"


def decode(text: str | bytes) -> Beat:
    """What :meth:`Beat.encode` wrote."""
    return Beat(**parse_json(text))


class Judge:
    """Who of the watched processes is silent, and whether all of them stand still. No clock is compared with another's.

    Args:
        silence: seconds after which a silent process counts as dead.
        quick: the same where a connection has broken off: somebody has died, and it is only to be found who.
        own: the rank of the judge, who is not silent.
    """

    def __init__(self, silence: float, quick: float, own: int = 0) -> None:
        self.silence, self.quick, self.own = silence, quick, own
        self.beats: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}
        self._broken_since: float | None = None
        self._reported: set[int] = set()

    def hear(self, beats: dict[int, Beat], now: float) -> None:
        """Note what was read at ``now``."""
        for rank, beat in beats.items():
            if rank not in self.beats or self.beats[rank].count != beat.count:
                self._changed[rank] = now
            self.beats[rank] = beat
        if self._broken_since is None and any(beat.broken for beat in beats.values()):
            self.break_off(now)

    def break_off(self, now: float) -> None:
        """A connection has broken off."""
        self._broken_since = now if self._broken_since is None else self._broken_since

    def silent(self, now: float) -> list[int]:
        """The ranks that count as dead."""
        limit = self.silence if self._broken_since is None else self.quick
        late = [rank for rank in self.beats if rank != self.own and now - self._changed[rank] > limit]
        return [rank for rank in late if not self.beats[rank].bye]

    def verdict(self, now: float) -> str | None:
        """Why the run cannot go on, if it cannot."""
        if silent := self.silent(now):
            last = some((f"rank {rank} on {self.beats[rank].node} ({self._last(rank)})" for rank in silent), shown=4)
            least = min(now - self._changed[rank] for rank in silent)
            return f"no sign of life for {least:.0f} s from {last}"
        working = {rank: beat for rank, beat in self.beats.items() if not beat.bye}
        if working and all(beat.age > beat.limit for beat in working.values()):
            # Whoever holds up the others is most likely among those that have come least far.
            behind = sorted(working, key=lambda rank: (working[rank].steps, rank))
            told = some((f"rank {rank} on {working[rank].node} is {working[rank]}" for rank in behind), shown=4)
            least = min(beat.age for beat in working.values())
            return f"no process has got on for {least:.0f} s: {told}"
        return None

    def reports(self) -> list[str]:
        """A line for each read that takes long, once."""
        lines = []
        for rank, beat in self.beats.items():
            if not (beat.own and beat.age > self.silence):
                self._reported.discard(rank)
            elif rank not in self._reported:
                self._reported.add(rank)
                lines.append(f"warning: {stuck(rank, beat)}; the run ends after {STUCK_FACTOR * self.silence:.0f} s")
        return lines

    def _last(self, rank: int) -> str:
        beat = self.beats[rank]
        return f"it was {beat.what}, {beat.place()}"


def stuck(rank: int, beat: Beat) -> str:
    """That a process is held up by nothing but what it does itself."""
    return f"rank {rank} on {beat.node} has been {beat.what} for {beat.age:.0f} s, {beat.place()}"
