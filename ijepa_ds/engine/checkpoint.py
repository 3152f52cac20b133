"""Reading a run's checkpoints: any number of processes reads what any other number wrote.

Checksums of all that is taken are compared. What one rank finds damaged is refused on all, and :func:`load_newest` goes
back to the newest checkpoint that no rank finds damaged. How they are written: ``checkpoint_writer.py``.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ijepa_ds.distributed import Process, from_main, gather
from ijepa_ds.engine.checkpoint_files import SET_ASIDE, Checkpoint, list_checkpoints, open_checkpoint, set_aside
from ijepa_ds.engine.rank_files import Damaged, RankFile
from ijepa_ds.engine.shards import Shard
from ijepa_ds.engine.snapshot import Shapes
from ijepa_ds.engine.trainable import State
from ijepa_ds.errors import UserError, some

VISIBLE = 10.0  # seconds until a checkpoint that rank 0 sees must be seen by all


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that a run goes on from; ``warning``: a line, where it is not the newest one."""

    checkpoint: Path
    step: int
    warning: str | None = None


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


def load_newest(folder: Path, state: State, process: Process, start: Path | None = None) -> Loaded | None:
    """:func:`load` the newest checkpoint that is not damaged; ``start`` where there is none at all, None without it.

    Those that are damaged are set aside. All processes call this together, and take the same one.

    Raises:
        UserError: every one is damaged, or one is of another model.
    """
    # Rank 0 decides: on a shared file system others may see it late.
    own = list_checkpoints(folder)[::-1] if process.is_main else []
    found = from_main(own or ([] if start is None else [start]), process)
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
            f"no checkpoint in {found[0].parent} is whole: {some((one.what for one in damaged), shown=3)}; put back a "
            "copy of one, or choose another ijepa.run.name to start over"
        )
    return None


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
