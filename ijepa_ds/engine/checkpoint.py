"""Checkpoints: a folder a step, complete or absent, readable by any number of processes.

Each rank writes its slices of the fp32 master weights, of Adam's moments and of the target encoder's average, by
parameter name and interval. All write into ``tmp.step_N``; when every file is on disk, rank 0 renames the folder. So a
kill at any moment leaves the previous checkpoint whole, and what has no ``tmp`` in its name is complete. The working
weights are not stored: they are the masters, cast.

Saving has three parts. :func:`snapshot` copies the state to the host: all that training must wait for. :func:`write`
needs neither the device nor another process. :func:`commit` is what the processes do together.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.distributed import Process, barrier, gather, on_any_rank
from ijepa_ds.engine.checkpoint_files import FORMAT, list_checkpoints, open_files, read_state
from ijepa_ds.engine.shards import Shard
from ijepa_ds.engine.trainable import State
from ijepa_ds.errors import UserError
from ijepa_ds.files import sync, write_synced

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Snapshot:
    """A copy of this process's state on the host; ``tensors``: kind -> parameter -> (first element, values)."""

    tensors: dict[str, dict[str, Any]]
    shapes: Shapes
    owned: bool


def save(folder: Path, step: int, state: State, process: Process, *, keep: int) -> Path:
    """Write the state after ``step`` steps; returns its folder. ``keep``: how many checkpoints stay, this one included.

    All processes call this together.

    Raises:
        UserError: some rank cannot write (a full disk), on every rank; earlier checkpoints stay.
    """
    problem: OSError | None = None
    copied = snapshot(state)
    try:
        begin(folder, step, process)
        write(copied, _unfinished(folder, step), process.rank)
    except OSError as error:
        problem = error
    return commit(folder, step, copied.shapes, process, keep=keep, problem=problem)


def snapshot(state: State) -> Snapshot:
    """Copy what this process owns of the state to the host."""
    tensors: dict[str, dict[str, Any]] = {kind: {} for kind in state.slices}
    if state.owned:
        for kind, slices in state.slices.items():
            for shard, values in slices:
                host = values.detach().cpu()
                # Cloned: a view would drag the whole slice into the file with it.
                tensors[kind] |= {piece.name: (piece.start, piece.of(host).clone()) for piece in shard.pieces()}
    tensors["adam_steps"] = {group: float(counters[0]) for group, counters in state.adam_steps.items()}
    return Snapshot(tensors, state.shapes, state.owned)


def begin(folder: Path, step: int, process: Process) -> None:
    """Make the folder that all ranks write to; an error is raised on rank 0, and on the others when they write."""
    temporary = _unfinished(folder, step)
    try:
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    finally:
        barrier(process)


def write(copied: Snapshot, folder: Path, rank: int) -> None:
    """Write this rank's file and bring it to the disk; nothing, where another process owns the same."""
    if copied.owned:
        write_synced(folder / f"rank_{rank:05d}.pt", lambda file: torch.save(copied.tensors, file))


def commit(
    folder: Path, step: int, shapes: Shapes, process: Process, *, keep: int, problem: OSError | None = None
) -> Path:
    """Give the checkpoint its name once every rank has written, and remove those beyond ``keep``.

    ``shapes``: of the parameters that this process knows of; ``problem``: why it could not write.

    Raises:
        UserError: on every rank, if there was a problem on any.
    """
    final, temporary = folder / f"step_{step:09d}", _unfinished(folder, step)
    whole = _union(shapes, process)
    if process.is_main and problem is None:
        try:
            state = {"format": FORMAT, "step": step, "processes": process.world_size, "shapes": whole}
            write_synced(temporary / "state.json", lambda file: file.write(json.dumps(state).encode()))
            sync(temporary)
        except OSError as error:
            problem = error
    if on_any_rank([problem is not None], process)[0]:
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder} ({problem or 'on another rank'}); free "
            "some space and start the same command again: it goes on from the previous checkpoint"
        )
    if process.is_main:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier(process)
    return final


def load(checkpoint: Path, state: State, process: Process) -> int:
    """Fill the state's tensors; returns the step to go on with. Any number of processes may read any other's.

    The caller publishes what was filled. All processes call this together.

    Raises:
        UserError: the checkpoint is damaged, incomplete or of another model.
    """
    saved = read_state(checkpoint)
    shapes = _union(state.shapes, process)
    if shapes != saved["shapes"]:
        names = sorted(n for n in shapes.keys() | saved["shapes"].keys() if shapes.get(n) != saved["shapes"].get(n))
        raise UserError(f"{checkpoint} is of another model: {len(names)} tensors differ, such as {names[0]}")
    files = open_files(checkpoint)
    for kind, slices in state.slices.items():
        for shard, values in slices:
            _fill(shard, values, [file[kind] for file in files], checkpoint)
    for group, counters in state.adam_steps.items():
        steps = next(file["adam_steps"][group] for file in files if group in file["adam_steps"])
        for counter in counters:
            counter.fill_(steps)
    return saved["step"]


def _unfinished(folder: Path, step: int) -> Path:
    return folder / f"tmp.step_{step:09d}"


def _union(shapes: Shapes, process: Process) -> Shapes:
    """What all processes know together: each may hold a part of the parameters."""
    return {name: shape for known in gather(shapes, process) for name, shape in known.items()}


def _fill(shard: Shard, values: Tensor, files: list[dict[str, Any]], checkpoint: Path) -> None:
    for piece in shard.pieces():
        missing = piece.stop - piece.start
        for file in files:
            start, saved = file.get(piece.name, (0, values[:0]))
            low, high = max(start, piece.start), min(start + len(saved), piece.stop)
            if low < high:
                piece.of(values)[low - piece.start : high - piece.start].copy_(saved[low - start : high - start])
                missing -= high - low
        if missing:
            raise UserError(
                f"{checkpoint} lacks {missing} elements of {piece.name}; remove this folder to use the one before"
            )
