"""When a run saves, and what it refuses to save."""

from __future__ import annotations

import math
import time
from pathlib import Path

from ijepa_ds.config import CheckpointConfig
from ijepa_ds.distributed import Process, on_any_rank
from ijepa_ds.engine.checkpoint import save
from ijepa_ds.engine.rank_files import all_finite
from ijepa_ds.engine.trainable import Outcome, State


class Saver:
    """Writes a run's checkpoints into ``folder``; ``saved_step`` is the newest one's, -1 before there is one."""

    def __init__(
        self, folder: Path, settings: CheckpointConfig, process: Process, *, steps_per_epoch: int, saved_step: int = -1
    ) -> None:
        self.folder, self.settings, self.process, self.saved_step = folder, settings, process, saved_step
        self.keep_every = settings.keep_epochs * steps_per_epoch
        self._saved_time = time.monotonic()

    def due_by_time(self) -> bool:
        """Whether a checkpoint is due by this process's clock: others may differ."""
        return self.settings.minutes > 0 and time.monotonic() - self._saved_time > 60 * self.settings.minutes

    def due_by_steps(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps, on all processes alike."""
        return any(every > 0 and step % every == 0 for every in (self.settings.steps, self.keep_every))

    def save(self, step: int, state: State, outcome: Outcome | None) -> str:
        """Save the state after ``step`` steps, the last of which did ``outcome``; returns what to say of it.

        All processes call this together.
        """
        began, lines = time.monotonic(), list[str]()
        diverged, broken = on_any_rank([not _last_update_was_finite(outcome), not is_finite(state)], self.process)
        if diverged or broken:
            what = "its loss or gradient is not finite" if diverged else "its weights or moments are not finite"
            return f"step {step} is not saved: {what}; what was saved before stays"
        keep = {"keep": self.settings.keep, "keep_every": self.keep_every}
        path = save(self.folder, step, state, self.process, **keep, say=lines.append)
        self.saved_step, self._saved_time = step, time.monotonic()
        return "\n".join([*lines, f"saved {path} in {time.monotonic() - began:.1f} s"])

    def newest(self) -> str:
        """What is known of the newest checkpoint, for who has to go back to it."""
        if self.saved_step < 0:
            return "nothing was saved"
        return (
            f"the checkpoint of step {self.saved_step} held finite weights when it was written or read, and python -m "
            f"ijepa_ds checkpoints {self.folder.parent} --verify reads them all again"
        )


def is_finite(state: State) -> bool:
    """Whether all that a checkpoint would hold of this process is: else it could not be read again."""
    return all_finite([values for slices in state.slices.values() for _, values in slices])


def _last_update_was_finite(outcome: Outcome | None) -> bool:
    """Waits for the device."""
    if outcome is None or not bool(outcome.applied):
        return True  # nothing moved since the step before
    norm = outcome.gradient_norm
    return math.isfinite(outcome.losses[-1]) and (norm is None or 0 <= float(norm) < math.inf)
