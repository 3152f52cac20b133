"""The signals that ask a run to stop."""

from __future__ import annotations

import signal


class StopRequest:
    """These signals ask for a checkpoint and an end at the next step; a second SIGINT ends at once.

    A hang-up, which a terminal sends when it is closed, is left ignored where it is, as under ``nohup``.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested: str | None = None
        heeded = [n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heeded}

    def _note(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def restore(self) -> None:
        """Put back what handled these signals before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
