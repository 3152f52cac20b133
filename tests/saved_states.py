"""Small states of a run and their checkpoints, made in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from ijepa_ds.distributed import Process
from ijepa_ds.engine import checkpoint_files, rank_files
from ijepa_ds.engine.checkpoint import load
from ijepa_ds.engine.checkpoint_files import SavedState, read_weights
from ijepa_ds.engine.checkpoint_writer import write_own
from ijepa_ds.engine.shards import Placement, Shard
from ijepa_ds.engine.snapshot import views
from ijepa_ds.engine.trainable import State

OLD = Path(__file__).parent / "golden" / "format_1" / "checkpoints" / "step_000000010"
ALONE = Process(0, 1, torch.device("cpu"))
SHAPES = {"context_encoder.a": [7, 5], "context_encoder.b": [11], "predictor.c": [3, 2, 4]}
KINDS = ("master", "exp_avg", "exp_avg_sq", "target")
TOTAL = 70  # elements of all parameters


def state_of(rank: int = 0, world_size: int = 1, seed: int | None = 0) -> State:
    """A rank's equal slice of three parameters; without a ``seed`` all zeros, to be filled."""
    starts = (0, 35, 46)
    placements = tuple(
        Placement(name, start, torch.Size(shape)) for (name, shape), start in zip(SHAPES.items(), starts, strict=True)
    )
    length = TOTAL // world_size
    slices = {}
    for number, kind in enumerate(KINDS):
        values = torch.zeros(TOTAL)
        if seed is not None:
            values = torch.randn(TOTAL, generator=torch.Generator().manual_seed(10 * seed + number))
        known = placements[:2] if kind == "target" else placements
        own = values[rank * length : (rank + 1) * length].clone()
        slices[kind] = [(Shard("group", known, rank * length, length, None), own)]
    steps = torch.tensor(0.0 if seed is None else 3.0)
    return State(slices, {"group": [steps]}, True, "zero")


def save_as_two(folder: Path, step: int, seed: int = 0) -> Path:
    """What two ranks would write, without them."""
    path, records = folder / f"step_{step:09d}", {}
    path.mkdir(parents=True)
    for rank in range(2):
        record = write_own(path, step, views(state_of(rank, 2, seed)), Process(rank, 2, torch.device("cpu")))
        records[rank_files.rank_file(rank)] = record
    state = SavedState(format=2, step=step, processes=2, layout="zero", shapes=SHAPES, files=records)
    (path / "state.json").write_bytes(checkpoint_files.state_json(state))
    return path


def whole(path: Path) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for kind in KINDS for name, tensor in read_weights(path, kind).items()}


def taken(path: Path) -> dict[str, torch.Tensor]:
    """All that a lone process takes of a checkpoint, with the steps."""
    state = state_of(seed=None)
    step = load(path, state, ALONE)
    values = {kind: slices[0][1] for kind, slices in state.slices.items()}
    return {**values, "steps": torch.tensor([float(step), float(state.adam_steps["group"][0])])}
