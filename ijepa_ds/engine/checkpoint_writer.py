"""Writing a checkpoint, beside training or while it waits.

Each rank writes its slices of the fp32 master weights, of Adam's moments and of the target encoder's average, by
parameter name and interval. All write into ``tmp.step_N``; when every file is on disk, rank 0 renames the folder. So a
kill at any moment leaves the previous checkpoint whole, and what has no ``tmp`` in its name is complete. One that is
removed is renamed to ``tmp.step_N`` first. The working weights are not stored: they are the masters, cast.

A thread writes: it holds Python's lock for moments alone, for checksums, files and disks are waited for without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ijepa_ds.distributed import Process, from_main, gather
from ijepa_ds.engine.checkpoint_files import UNFINISHED, SavedState, make_room, prune, state_json
from ijepa_ds.engine.rank_files import CRC_THREADS, Contents, FileRecord, rank_file, write_rank_file
from ijepa_ds.engine.snapshot import Shapes, Snapshot, views
from ijepa_ds.engine.trainable import State
from ijepa_ds.errors import UserError, some
from ijepa_ds.files import sync, write_synced

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NICENESS = 10  # of the writing thread: training comes first where both want a core


@dataclass(frozen=True)
class Where:
    """Where checkpoints go, and which stay: the newest ``keep``, every ``keep_every``-th step's and ``keep_step``'s."""

    folder: Path
    keep: int
    keep_every: int = 0
    keep_step: int = 0

    @property
    def lasting(self) -> dict[str, int]:
        """Which stay, for those who remove the others."""
        return {"keep": self.keep, "keep_every": self.keep_every, "keep_step": self.keep_step}


@dataclass(frozen=True)
class _Written:
    """What the other processes are told of a rank's file."""

    shapes: Shapes
    record: FileRecord | None
    unfit: str | None = None  # why it must not be kept
    problem: str | None = None  # why it could not be written
    no_room: bool = False


class Writing:
    """One checkpoint on its way to the disk; all processes make it, and call each method, together.

    Args:
        copied: what is written; it must stay as it is until the end.
        step: of how many steps it is the state.
        beside_training: take one core at most, and leave that to whoever wants it.
        say: hears on every rank of what was removed to make room.

    ``path`` is the checkpoint's once it is complete. ``refusal`` says why there is none, where the state is not fit to
    be kept.
    """

    def __init__(
        self,
        where: Where,
        step: int,
        copied: Snapshot,
        process: Process,
        *,
        beside_training: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        self.where, self.step, self.copied, self.process, self.say = where, step, copied, process, say
        self.path: Path | None = None
        self.refusal: str | None = None
        self._temporary = unfinished(where.folder, step)
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_step_back if beside_training else None)
        self._made_room = False
        self._writing: Future[_Written] | None = self._pool.submit(self._write)
        self._naming: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether this process's thread is at work; to be waited for with :meth:`wait`, or asked again."""
        work = self._writing or self._naming
        return work is not None and not work.done()

    def wait(self) -> None:
        """Until this process's thread has done its part."""
        for work in (self._writing, self._naming):
            if work is not None:
                work.exception()

    def advance(self) -> bool:
        """Go on when no process is busy; true where nothing is left to do.

        Raises:
            UserError: some rank cannot write (a full disk), on every rank; at least one earlier checkpoint stays.
        """
        if self._writing is not None:
            done = self._after_writing(self._writing)
        else:
            done = self._after_naming()
        if done:
            self._pool.shutdown(wait=False)
        return done

    def finish(self) -> None:
        """The rest of it, waiting."""
        while not self.advance():
            pass

    # ------------------------------------------------------------------------------------------------- in the thread

    def _write(self) -> _Written:
        """Write this rank's file and bring it to the disk; nothing, where another process owns the same."""
        copied = self.copied
        copied.wait()
        if unfit := _unfit(copied):
            return _Written(copied.shapes, None, unfit)
        if not copied.owned:
            return _Written(copied.shapes, None)
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            record = write_own(self._temporary, self.step, copied, self.process)
        except OSError as error:
            return _Written(copied.shapes, None, problem=str(error), no_room=error.errno in _NO_ROOM)
        return _Written(copied.shapes, record)

    def _name(self, known: list[_Written]) -> None:
        """On rank 0: the checkpoint becomes one, and those that it replaces go."""
        state = SavedState(
            format=2,
            step=self.step,
            processes=self.process.world_size,
            layout=self.copied.layout,
            shapes={name: shape for written in known for name, shape in written.shapes.items()},
            files={rank_file(rank): written.record for rank, written in enumerate(known) if written.record is not None},
        )
        write_synced(self._temporary / "state.json", lambda file: file.write(state_json(state)))
        sync(self._temporary)
        final = self.where.folder / f"step_{self.step:09d}"
        _take_place(self._temporary, final)
        prune(final, **self.where.lasting)

    # ---------------------------------------------------------------------------------------------- all ranks together

    def _after_writing(self, writing: Future[_Written]) -> bool:
        known: list[_Written] = gather(writing.result(), self.process)
        self._writing = None
        problem = next((written.problem for written in known if written.problem), None)
        self.refusal = next((written.unfit for written in known if written.unfit), None)
        if self.refusal is not None:
            self._clear()
            return True
        if problem is not None:
            self._clear()
            if not self._make_room(any(written.no_room for written in known)):
                raise self._not_written(problem)
            self._writing = self._pool.submit(self._write)
            return False
        if self.process.is_main:
            self._naming = self._pool.submit(self._name, known)
        return False

    def _after_naming(self) -> bool:
        problem = None
        try:
            if self._naming is not None:
                self._naming.result()
        except OSError as error:
            problem = str(error)
        problem = from_main(problem, self.process)
        if problem is not None:
            self._clear()
            raise self._not_written(problem)
        self.path = self.where.folder / f"step_{self.step:09d}"
        return True

    def _make_room(self, no_room: bool) -> bool:
        """Remove once, for want of room, what the save would remove afterwards."""
        if not no_room or self._made_room:
            return False
        self._made_room = True
        spare = make_room(self.where.folder, **self.where.lasting) if self.process.is_main else []
        removed = from_main([path.name for path in spare], self.process)
        if removed:
            what = some(removed)
            self.say(f"no room for the checkpoint of step {self.step}: {what} removed before it is written, not after")
        return bool(removed)

    def _clear(self) -> None:
        if self.process.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _not_written(self, problem: str) -> UserError:
        self._pool.shutdown(wait=False)
        return UserError(
            f"the checkpoint of step {self.step} could not be written to {self.where.folder} ({problem}); "
            "free some space and start the same command again: it goes on from the previous checkpoint"
        )


def save(
    folder: Path,
    step: int,
    state: State,
    process: Process,
    *,
    keep: int,
    keep_every: int = 0,
    say: Callable[[str], object] = print,
) -> Path:
    """Write the state after ``step`` steps; returns its folder. All processes call this together, and wait.

    ``keep``: how many checkpoints stay, this one included, beside those of every ``keep_every``-th step. Where there is
    no room, those that would be removed afterwards are removed first; ``say`` hears of it.

    Raises:
        UserError: some rank cannot write (a full disk), or the state is not finite, on every rank.
    """
    writing = Writing(Where(folder, keep, keep_every), step, views(state), process, say=say)
    writing.finish()
    if writing.path is None:
        raise UserError(f"step {step} is not saved: {writing.refusal}; what was saved before stays")
    return writing.path


def write_own(folder: Path, step: int, copied: Snapshot, process: Process) -> FileRecord:
    """Write this rank's file of a checkpoint, until the disk has it; or OSError."""
    contents = Contents(
        step=step,
        rank=process.rank,
        processes=process.world_size,
        layout=copied.layout,
        adam_steps={group: float(steps) for group, steps in copied.adam_steps.items()},
        slices={},
    )
    return write_rank_file(folder / rank_file(process.rank), copied.tensors, contents)


def unfinished(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written until it is complete."""
    return folder / f"{UNFINISHED}step_{step:09d}"


def _unfit(copied: Snapshot) -> str | None:
    """Why it must not become a checkpoint: it could not be read again."""
    if copied.last_update is not None:
        loss, norm = map(float, copied.last_update)
        if not (np.isfinite(loss) and np.isfinite(norm) and norm >= 0):
            return "its loss or gradient is not finite"
    for slices in copied.tensors.values():
        for _, values in slices.values():
            array = values.numpy()  # numpy's: torch would take all cores for it
            if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
                return "its weights or moments are not finite"
    return None


def _step_back() -> None:
    """Let this thread have a core, and no more, when no other wants it."""
    CRC_THREADS.set(1)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _take_place(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name; one that had it is removed."""
    old = final.with_name(f"{UNFINISHED}replaced.{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    sync(final.parent)
