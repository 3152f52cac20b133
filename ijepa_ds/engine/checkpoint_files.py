"""The files of a checkpoint, read without any process group."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.errors import UserError

FORMAT = 1


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob("tmp.*"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps that a checkpoint stands for."""
    return read_state(checkpoint)["step"]


def checkpoint_processes(checkpoint: Path) -> int:
    """The number of processes that wrote a checkpoint."""
    return read_state(checkpoint).get("processes", 1)


def read_weights(checkpoint: Path, kind: str, prefix: str = "") -> dict[str, Tensor]:
    """Whole fp32 tensors by parameter name from a checkpoint's files, on the CPU, without any process group.

    ``kind``: "master" for what is trained, "target" for the target encoder. ``prefix`` selects and is cut off.
    """
    shapes = read_state(checkpoint)["shapes"]
    weights: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for file in open_files(checkpoint):
        for name, (start, values) in file[kind].items():
            whole = weights.setdefault(name, torch.empty(shapes[name]))
            whole.view(-1)[start : start + len(values)] = values
            filled[name] = filled.get(name, 0) + len(values)
    incomplete = [name for name, count in filled.items() if count != weights[name].numel()]
    if incomplete or not weights:
        raise UserError(
            f"{checkpoint} lacks parts of {incomplete[:3] or kind}; remove this folder to use the one before"
        )
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says: format, step, number of processes, whole shapes by parameter name."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(state, dict) or not {"format", "step", "shapes"} <= state.keys():
            raise ValueError("state.json lacks what it must hold")
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is damaged ({error}); remove this folder to go on from the one before") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{checkpoint} has format {state.get('format')}, this version reads {FORMAT}")
    return state


def open_files(checkpoint: Path) -> list[dict[str, Any]]:
    """The ranks' files, mapped: kind -> parameter -> (first element, values), and "adam_steps" by group."""
    files: list[dict[str, Any]] = []
    for path in sorted(checkpoint.glob("rank_*.pt")):
        try:
            files.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} is damaged ({reason}); remove {checkpoint} to go on from the one before"
            ) from error
    if not files:
        raise UserError(f"{checkpoint} holds no rank_*.pt; remove this folder to go on from the one before")
    return files
