"""When a run saves, and what it says of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ijepa_ds.distributed import Process
from ijepa_ds.engine.checkpoint_writer import Where, Writing
from ijepa_ds.engine.snapshot import HostCopies, views
from ijepa_ds.engine.trainable import Outcome, State
from ijepa_ds.settings import CheckpointConfig


class Saver:
    """Writes a run's checkpoints into ``folder``, one at a time, while training goes on.

    Every process calls each method at the same step. ``saved_step`` is the newest checkpoint's, -1 before there is one;
    ``say`` hears when one is complete, and why one is not; the checkpoint of ``keep_step`` is written, and stays.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        process: Process,
        *,
        steps_per_epoch: int,
        say: Callable[[str], object],
        saved_step: int = -1,
        keep_step: int = 0,
    ) -> None:
        self.settings, self.process, self.saved_step, self.say = settings, process, saved_step, say
        self.tried_step = saved_step  # the newest that was to be saved
        self.keep_every = settings.keep_epochs * steps_per_epoch
        self.where = Where(folder, settings.keep, self.keep_every, keep_step)
        self._copies = HostCopies()
        self._writing: Writing | None = None
        self._began = self._waited = 0.0  # of the one that is written: when, and seconds that training waited for it
        self._questions = 0  # asked since it was begun, or went on
        self._saved_time = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether this process still writes: a flag to ask all of, for :meth:`hear`."""
        return self._writing is not None and self._writing.busy

    def due_by_time(self) -> bool:
        """Whether a checkpoint is due by this process's clock: others may differ."""
        waited = time.monotonic() - self._saved_time
        return self.settings.minutes > 0 and waited > 60 * self.settings.minutes and self._writing is None

    def due_by_steps(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps, on all processes alike."""
        every = self.settings.steps, self.keep_every
        return step == self.where.keep_step or any(steps > 0 and step % steps == 0 for steps in every)

    def save(self, step: int, state: State, outcome: Outcome | None, *, wait: bool = False) -> None:
        """Begin to save the state after ``step`` steps, the last of which did ``outcome``, when the one before is done.

        ``wait``: until it is complete.

        Raises:
            UserError: some rank cannot write, on every rank.
        """
        self.finish()
        self._began = self._saved_time = time.monotonic()
        self.tried_step = step
        background = self.settings.background and not wait
        copied = self._copies.fit(state) if background else False
        snapshot = self._copies.take(state, outcome) if copied else views(state, outcome)
        self._writing = Writing(self.where, step, snapshot, self.process, beside_training=background, say=self.say)
        if background and not copied:  # the others may go on: they wait for this process in the next step
            self._writing.wait()
        self._questions, self._waited = 0, time.monotonic() - self._began
        if not background:
            self.finish()

    def hear(self, busy: bool, *, delay: int) -> None:
        """Go on with what no process is busy with. Called once a step.

        ``busy``: whether any process was, when all were asked ``delay`` calls before.
        """
        self._questions += 1
        if self._writing is not None and not busy and self._questions > delay:
            began = time.monotonic()
            done = self._writing.advance()
            self._questions, self._waited = 0, self._waited + time.monotonic() - began
            if done:
                self._report(self._writing)

    def finish(self) -> None:
        """Until what was begun is complete."""
        if self._writing is not None:
            began = time.monotonic()
            self._writing.finish()
            self._waited += time.monotonic() - began
            self._report(self._writing)

    def newest(self) -> str:
        """What is known of the newest checkpoint, for who has to go back to it."""
        if self.saved_step < 0:
            return "nothing was saved"
        return (
            f"the checkpoint of step {self.saved_step} held finite weights when it was written or read, and python -m "
            f"ijepa_ds checkpoints {self.where.folder.parent} --verify reads them all again"
        )

    def _report(self, writing: Writing) -> None:
        self._writing = None
        if writing.path is None:
            self.say(f"step {writing.step} is not saved: {writing.refusal}; what was saved before stays")
            return
        self.saved_step = writing.step
        seconds = time.monotonic() - self._began
        self.say(f"saved {writing.path} in {seconds:.1f} s, for {self._waited:.2f} s of which training waited")
