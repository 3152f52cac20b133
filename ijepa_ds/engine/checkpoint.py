"""Checkpoints: a folder a step, complete or absent, readable by any number of processes.

Each rank writes its slices of the fp32 master weights, of Adam's moments and of the target encoder's average, by
parameter name and interval. All write into ``tmp.step_N``; when every file is on disk, rank 0 renames the folder. So a
kill at any moment leaves the previous checkpoint whole, and what has no ``tmp`` in its name is complete. The working
weights are not stored: they are the masters, cast.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ijepa_ds.distributed import Process, barrier, on_any_rank
from ijepa_ds.engine.checkpoint_files import FORMAT, TARGET, _open, _state, list_checkpoints
from ijepa_ds.engine.shards import MasterShard, publish_masters
from ijepa_ds.engine.target_encoder import TargetEncoder
from ijepa_ds.errors import UserError
from ijepa_ds.files import sync, write_synced

_ADAM = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path,
    step: int,
    shards: list[MasterShard],
    target_encoder: TargetEncoder,
    adam_state: Callable[[MasterShard], dict[str, Tensor]],
    process: Process,
    *,
    keep: int,
) -> Path:
    """Write the state after ``step`` steps; returns its folder. ``keep``: how many checkpoints stay, this one included.

    A rank that cannot write (a full disk) makes all ranks raise :class:`UserError`; earlier checkpoints stay.
    """
    final, temporary = folder / f"step_{step:09d}", folder / f"tmp.step_{step:09d}"
    error = None
    if process.is_main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as caught:  # the writing below fails with it, on every rank
            error = caught
    barrier(process)
    try:
        if process.is_main or shards[0].process_group is not None:  # what is not sharded is written once
            tensors = _own_tensors(shards, target_encoder, adam_state)
            write_synced(temporary / f"rank_{process.rank:05d}.pt", lambda file: torch.save(tensors, file))
        if process.is_main:
            shapes = {p.name: list(p.shape) for shard in shards for p in shard.placements}
            state = {"format": FORMAT, "step": step, "processes": process.world_size, "shapes": shapes}
            write_synced(temporary / "state.json", lambda file: file.write(json.dumps(state).encode()))
            sync(temporary)
    except OSError as caught:
        error = error or caught
    if on_any_rank([error is not None], process)[0]:
        if process.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder} ({error or 'on another rank'}); free some "
            "space and start the same command again: it goes on from the previous checkpoint"
        )
    if process.is_main:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier(process)
    return final


def load_checkpoint(
    checkpoint: Path,
    shards: list[MasterShard],
    target_encoder: TargetEncoder,
    adam_state: Callable[[MasterShard], dict[str, Tensor]],
) -> int:
    """Restore masters, moments and the target encoder; returns the step to go on with. Any number of processes may read
    what any other number wrote."""
    state = _state(checkpoint)
    shapes = {p.name: list(p.shape) for shard in shards for p in shard.placements}
    if shapes != state["shapes"]:
        names = sorted(n for n in shapes.keys() | state["shapes"].keys() if shapes.get(n) != state["shapes"].get(n))
        raise UserError(f"{checkpoint} is of another model: {len(names)} tensors differ, such as {names[0]}")
    files = _open(checkpoint)
    for shard in shards:
        adam = adam_state(shard)
        adam["step"].fill_(files[0]["adam_steps"][shard.group])
        _fill(shard, shard.master, files, "master", checkpoint)
        for name in _ADAM:
            _fill(shard, adam[name], files, name, checkpoint)
    for shard, average in zip(target_encoder.shards, target_encoder.averages, strict=True):
        _fill(shard, average, files, TARGET, checkpoint)
    publish_masters(shards)
    target_encoder.publish()
    return state["step"]


def _own_tensors(shards, target_encoder, adam_state) -> dict:
    """What this rank writes: kind -> parameter -> (first element, values on the CPU)."""
    tensors: dict = {"master": {}, "exp_avg": {}, "exp_avg_sq": {}, TARGET: {}, "adam_steps": {}}

    def add(kind: str, shard: MasterShard, values: Tensor) -> None:
        values = values.detach().view(-1).cpu()
        for piece in shard.pieces():
            tensors[kind][piece.name] = (piece.start, piece.of(values).clone())

    for shard in shards:
        adam = adam_state(shard)
        tensors["adam_steps"][shard.group] = float(adam["step"])
        add("master", shard, shard.master)
        for name in _ADAM:
            add(name, shard, adam[name])
    for shard, average in zip(target_encoder.shards, target_encoder.averages, strict=True):
        add(TARGET, shard, average)
    return tensors


def _fill(shard: MasterShard, values: Tensor, files: list[dict], kind: str, checkpoint: Path) -> None:
    flat = values.detach().view(-1)
    for piece in shard.pieces():
        missing = piece.stop - piece.start
        for file in files:
            start, saved = file[kind].get(piece.name, (0, flat[:0]))
            low, high = max(start, piece.start), min(start + len(saved), piece.stop)
            if low < high:
                piece.of(flat)[low - piece.start : high - piece.start].copy_(saved[low - start : high - start])
                missing -= high - low
        if missing:
            raise UserError(
                f"{checkpoint} lacks {missing} elements of {piece.name}; remove this folder to use the one before"
            )
