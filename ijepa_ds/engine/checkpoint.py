"""Checkpoints: a folder a step, complete or absent, readable by any number of processes, and checked when it is read.

Each rank writes its slices of the fp32 master weights, of Adam's moments and of the target encoder's average, by
parameter name and interval. All write into ``tmp.step_N``; when every file is on disk, rank 0 renames the folder. So a
kill at any moment leaves the previous checkpoint whole, and what has no ``tmp`` in its name is complete. One that is
removed is renamed to ``tmp.step_N`` first. The working weights are not stored: they are the masters, cast.

Saving has three parts. :func:`snapshot` copies the state to the host: all that training must wait for. :func:`write`
needs neither the device nor another process. :func:`commit` is what the processes do together.

Reading compares checksums of all that it takes. What one rank finds damaged is refused on all, and
:func:`load_newest` goes back to the newest checkpoint that no rank finds damaged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ijepa_ds.distributed import Process, barrier, from_main, gather, on_any_rank
from ijepa_ds.engine.checkpoint_files import (
    SET_ASIDE,
    UNFINISHED,
    Checkpoint,
    SavedState,
    list_checkpoints,
    make_room,
    open_checkpoint,
    prune,
    set_aside,
    state_json,
)
from ijepa_ds.engine.rank_files import Contents, Damaged, FileRecord, RankFile, Slices, rank_file
from ijepa_ds.engine.rank_files import write_rank_file as _write_rank_file
from ijepa_ds.engine.shards import Shard
from ijepa_ds.engine.trainable import State
from ijepa_ds.errors import UserError, some
from ijepa_ds.files import sync, write_synced

Shapes = dict[str, list[int]]
VISIBLE = 10.0  # seconds until a checkpoint that rank 0 sees must be seen by all
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Snapshot:
    """A copy of this process's state on the host."""

    tensors: Slices
    adam_steps: dict[str, float]  # by group
    shapes: Shapes  # whole, of the parameters that this process knows of
    layout: str
    owned: bool


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that a run goes on from; ``warning``: a line, where it is not the newest one."""

    checkpoint: Path
    step: int
    warning: str | None = None


class NotWritten(UserError):
    """A checkpoint that could not be written, on any rank; ``no_room``: for want of room."""

    def __init__(self, message: str, *, no_room: bool) -> None:
        super().__init__(message)
        self.no_room = no_room


def save(
    folder: Path,
    step: int,
    state: State,
    process: Process,
    *,
    keep: int,
    keep_every: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the state after ``step`` steps; returns its folder.

    ``keep``: how many checkpoints stay, this one included, beside those of every ``keep_every``-th step. Where there is
    no room, those that would be removed afterwards are removed first; ``say`` hears of it. All processes call this
    together.

    Raises:
        UserError: some rank cannot write (a full disk), on every rank; at least one earlier checkpoint stays.
    """
    copied = snapshot(state)
    try:
        return _save(folder, step, copied, process, keep=keep, keep_every=keep_every)
    except NotWritten as error:
        spare = make_room(folder, keep=keep, keep_every=keep_every) if error.no_room and process.is_main else []
        removed = from_main([path.name for path in spare], process)
        if not removed:
            raise
        say(f"no room for the checkpoint of step {step}: {some(removed)} removed before it is written, not after")
    return _save(folder, step, copied, process, keep=keep, keep_every=keep_every)


def _save(folder: Path, step: int, copied: Snapshot, process: Process, *, keep: int, keep_every: int) -> Path:
    problem, record = None, None
    try:
        begin(folder, step, process)
        record = write(copied, unfinished(folder, step), step, process)
    except OSError as error:
        problem = error
    return commit(folder, step, copied, record, process, keep=keep, keep_every=keep_every, problem=problem)


def snapshot(state: State) -> Snapshot:
    """Copy what this process owns of the state to the host."""
    tensors: Slices = {kind: {} for kind in state.slices}
    if state.owned:
        for kind, slices in state.slices.items():
            for shard, values in slices:
                host = values.detach().cpu()
                # Cloned: on a CPU it would be the state itself.
                tensors[kind] |= {piece.name: (piece.start, piece.of(host).clone()) for piece in shard.pieces()}
    adam_steps = {group: float(counters[0]) for group, counters in state.adam_steps.items()}
    return Snapshot(tensors, adam_steps, state.shapes, state.layout, state.owned)


def begin(folder: Path, step: int, process: Process) -> None:
    """Make the folder that all ranks write to; an error is raised on rank 0, and on the others when they write."""
    temporary = unfinished(folder, step)
    try:
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    finally:
        barrier(process)


def write(copied: Snapshot, folder: Path, step: int, process: Process) -> FileRecord | None:
    """Write this rank's file and bring it to the disk; nothing, where another process owns the same.

    Returns what :func:`commit` is to know of it.
    """
    if not copied.owned:
        return None
    contents = Contents(
        step=step,
        rank=process.rank,
        processes=process.world_size,
        layout=copied.layout,
        adam_steps=copied.adam_steps,
        slices={},
    )
    return _write_rank_file(folder / rank_file(process.rank), copied.tensors, contents)


def commit(
    folder: Path,
    step: int,
    copied: Snapshot,
    record: FileRecord | None,
    process: Process,
    *,
    keep: int,
    keep_every: int = 0,
    problem: OSError | None = None,
) -> Path:
    """Give the checkpoint its name once every rank has written, and remove those beyond ``keep``.

    ``record``: of the file that this process wrote; ``problem``: why it could not write.

    Raises:
        NotWritten: on every rank, if there was a problem on any.
    """
    final, temporary = folder / f"step_{step:09d}", unfinished(folder, step)
    known = gather((copied.shapes, record), process)
    if process.is_main and problem is None:
        state = SavedState(
            format=2,
            step=step,
            processes=process.world_size,
            layout=copied.layout,
            shapes={name: shape for shapes, _ in known for name, shape in shapes.items()},
            files={rank_file(rank): record for rank, (_, record) in enumerate(known) if record is not None},
        )
        problem = _problem(lambda: _write_state(temporary, state))
    _refuse_if_any(problem, temporary, step, process)
    if process.is_main:
        problem = _problem(lambda: _take_place(temporary, final))
    _refuse_if_any(problem, temporary, step, process)
    if process.is_main:
        prune(final, keep=keep, keep_every=keep_every)
    barrier(process)
    return final


def load(checkpoint: Path, state: State, process: Process) -> int:
    """Fill the state's tensors; returns the step to go on with. Any number of processes may read any other's.

    The caller publishes what was filled. All processes call this together.

    Raises:
        Damaged: the checkpoint is damaged or incomplete, on every rank where it is on any.
        UserError: it is of another model.
    """
    shapes = {name: shape for known in gather(state.shapes, process) for name, shape in known.items()}
    step, problem = 0, None
    try:
        if not process.is_main:
            _wait_until_visible(checkpoint)
        opened = open_checkpoint(checkpoint)
        step = opened.state.step
        _fill_state(opened, state, shapes)
    except UserError as error:
        problem = error
    for found in gather(problem, process):
        if found is not None:
            raise found
    return step


def load_newest(folder: Path, state: State, process: Process) -> Loaded | None:
    """:func:`load` the newest checkpoint that is not damaged; None where there is none at all.

    Those that are damaged are set aside. All processes call this together, and take the same one.

    Raises:
        UserError: every one is damaged, or one is of another model.
    """
    # Rank 0 decides: on a shared file system others may see it late.
    found = from_main(list_checkpoints(folder)[::-1] if process.is_main else [], process)
    damaged: list[Damaged] = []
    for checkpoint in found:
        try:
            step = load(checkpoint, state, process)
        except Damaged as error:
            damaged.append(error)
            continue
        if not damaged:
            return Loaded(checkpoint, step)
        for one in damaged if process.is_main else []:
            set_aside(one.checkpoint)
        what = "; ".join(one.what for one in damaged)
        return Loaded(
            checkpoint,
            step,
            f"warning: {what}; going on from step {step}, {checkpoint}, instead; what is damaged was renamed to "
            f"{some(SET_ASIDE + one.checkpoint.name for one in damaged)}",
        )
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole: {some((one.what for one in damaged), shown=3)}; put back a copy "
            "of one, or choose another ijepa.run.name to start over"
        )
    return None


def unfinished(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written until it is complete."""
    return folder / f"{UNFINISHED}step_{step:09d}"


def _problem(write: Callable[[], object]) -> OSError | None:
    """What keeps this process from it, which the others have to hear of."""
    try:
        write()
    except OSError as error:
        return error
    return None


def _refuse_if_any(problem: OSError | None, temporary: Path, step: int, process: Process) -> None:
    """End the save on every rank where a rank had a problem."""
    failed, no_room = on_any_rank([problem is not None, getattr(problem, "errno", None) in _NO_ROOM], process)
    if not failed:
        return
    if process.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    raise NotWritten(
        f"the checkpoint of step {step} could not be written to {temporary.parent} ({problem or 'on another rank'}); "
        "free some space and start the same command again: it goes on from the previous checkpoint",
        no_room=no_room,
    )


def _write_state(temporary: Path, state: SavedState) -> None:
    write_synced(temporary / "state.json", lambda file: file.write(state_json(state)))
    sync(temporary)


def _take_place(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name; one that had it is removed."""
    old = final.with_name(f"{UNFINISHED}replaced.{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    sync(final.parent)


def _wait_until_visible(checkpoint: Path, seconds: float = VISIBLE) -> None:
    """Let a network file system show what rank 0 sees: else it would count as damaged."""
    end = time.monotonic() + seconds
    while not (checkpoint / "state.json").exists() and time.monotonic() < end:
        for folder in (checkpoint.parent, checkpoint):
            with contextlib.suppress(OSError):
                os.listdir(folder)  # has what was remembered of it looked up again
        time.sleep(0.1)


def _fill_state(opened: Checkpoint, state: State, shapes: Shapes) -> None:
    """Fill this process's tensors, each slice of a file being read once."""
    saved = opened.state.shapes
    if shapes != saved:
        names = sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n))
        raise UserError(f"{opened.path} is of another model: {len(names)} tensors differ, such as {names[0]}")
    for kind, slices in state.slices.items():
        holders = opened.holders(kind)
        for shard, values in slices:
            _fill(kind, shard, values, holders, opened.path)
    adam_steps = {group: steps for file in opened.files for group, steps in file.adam_steps.items()}
    for group, counters in state.adam_steps.items():
        if group not in adam_steps:
            raise Damaged(opened.path, f"{opened.path} is damaged (it lacks Adam's steps of {group})")
        for counter in counters:
            counter.fill_(adam_steps[group])


def _fill(
    kind: str, shard: Shard, values: Tensor, holders: dict[str, list[tuple[int, int, RankFile]]], checkpoint: Path
) -> None:
    for piece in shard.pieces():
        missing = piece.stop - piece.start
        for start, count, file in holders.get(piece.name, []):
            low, high = max(start, piece.start), min(start + count, piece.stop)
            if low < high:
                saved = file.read(kind, piece.name)
                piece.of(values)[low - piece.start : high - piece.start].copy_(saved[low - start : high - start])
                missing -= high - low
        if missing:
            raise Damaged(checkpoint, f"{checkpoint} is damaged (it lacks {missing} elements of {kind} {piece.name})")
