"""The signals that ask a run to stop."""

from __future__ import annotations

import signal


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an end at the next step; a second SIGINT ends at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def restore(self) -> None:
        """Put back what handled these signals before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
