"""When a run saves, and what it refuses to save."""

from __future__ import annotations

import math
import time
from pathlib import Path

from ijepa_ds.config import CheckpointConfig
from ijepa_ds.distributed import Process, on_any_rank
from ijepa_ds.engine.checkpoint import save
from ijepa_ds.engine.trainable import Outcome, State


class Saver:
    """Writes a run's checkpoints into ``folder``; ``saved_step`` is the newest one's, -1 before there is one."""

    def __init__(self, folder: Path, settings: CheckpointConfig, process: Process, *, saved_step: int = -1) -> None:
        self.folder, self.settings, self.process, self.saved_step = folder, settings, process, saved_step
        self._saved_time = time.monotonic()

    def due_by_time(self) -> bool:
        """Whether a checkpoint is due by this process's clock: others may differ."""
        return self.settings.minutes > 0 and time.monotonic() - self._saved_time > 60 * self.settings.minutes

    def due_by_steps(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps, on all processes alike."""
        return self.settings.steps > 0 and step % self.settings.steps == 0

    def save(self, step: int, state: State, outcome: Outcome | None) -> str:
        """Save the state after ``step`` steps, the last of which did ``outcome``; returns what to say of it.

        All processes call this together.
        """
        began = time.monotonic()
        if on_any_rank([not _last_update_was_finite(outcome)], self.process)[0]:
            return f"step {step} is not saved: its loss or gradient is not finite; what was saved before stays"
        path = save(self.folder, step, state, self.process, keep=self.settings.keep)
        self.saved_step, self._saved_time = step, time.monotonic()
        return f"saved {path} in {time.monotonic() - began:.1f} s"


def _last_update_was_finite(outcome: Outcome | None) -> bool:
    """Waits for the device."""
    if outcome is None or not bool(outcome.applied):
        return True  # nothing moved since the step before
    norm = outcome.gradient_norm
    return math.isfinite(outcome.losses[-1]) and (norm is None or 0 <= float(norm) < math.inf)
