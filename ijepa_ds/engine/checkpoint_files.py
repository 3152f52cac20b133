"""The files of a checkpoint, read without any process group, and which checkpoints stay."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ijepa_ds.engine.rank_files import (
    FORMAT,
    SUFFIXES,
    Crc,
    Damaged,
    FileRecord,
    RankFile,
    Size,
    crc32,
    open_old_rank_file,
    open_rank_file,
)
from ijepa_ds.errors import UserError
from ijepa_ds.validation import Checked, Count, check, load_json

UNFINISHED, SET_ASIDE = "tmp.", "damaged."  # before the name of a folder that is no checkpoint: half written, or found


class SavedState(Checked):
    """state.json: of which step, and what belongs to it. Format 1 had no layout, list of files or checksum."""

    format: Literal[1, 2]
    step: Size
    processes: Count = 1
    layout: str = "-"
    shapes: dict[str, list[Size]]  # whole, by parameter name
    files: dict[Annotated[str, Field(pattern=r"^rank_\d{5}\.safetensors$")], FileRecord] = Field(default_factory=dict)
    crc32: Crc | None = None  # of all the rest


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened: everything is there and is of one step; the tensors are checked when read."""

    path: Path
    state: SavedState
    files: list[RankFile]

    def holders(self, kind: str) -> dict[str, list[tuple[int, int, RankFile]]]:
        """Parameter -> (first element, number of elements, file), in order."""
        found: dict[str, list[tuple[int, int, RankFile]]] = {}
        for file in self.files:
            for name, (first, count) in file.extents.get(kind, {}).items():
                found.setdefault(name, []).append((first, count, file))
        return {name: sorted(slices, key=lambda held: held[:2]) for name, slices in found.items()}

    def verify(self) -> None:
        """Read everything once; :class:`Damaged` where something is not as it was written."""
        for file in self.files:
            for kind, slices in file.extents.items():
                for name in slices:
                    file.read(kind, name)


# ------------------------------------------------------------------------------------------------------------- reading


def open_checkpoint(path: Path) -> Checkpoint:
    """Read state.json and the heads of all files; :class:`Damaged` where they do not make a whole checkpoint."""
    state = read_state(path)
    if state.format == 1:
        files = [open_old_rank_file(file) for file in sorted(path.glob(f"rank_*{SUFFIXES[1]}"))]
    else:
        files = [
            open_rank_file(path / name, record, step=state.step, rank=int(name[5:10]), processes=state.processes)
            for name, record in sorted(state.files.items())
        ]
    if not files:
        raise Damaged(path, f"{path} is damaged (it holds no rank's file)")
    checkpoint = Checkpoint(path, state, files)
    for kind in sorted({kind for file in files for kind in file.extents}):
        _check_covered(checkpoint, kind)
    return checkpoint


def read_state(checkpoint: Path) -> SavedState:
    """What state.json says; :class:`Damaged` where it cannot be believed."""
    file = checkpoint / "state.json"
    try:
        raw = load_json(file)
        if isinstance(raw, dict) and type(raw.get("format")) is int and raw["format"] > FORMAT:
            raise UserError(f"{checkpoint} has format {raw['format']}, this version reads up to {FORMAT}; update it")
        state, problems = check(SavedState, raw)
        if state is None:
            raise ValueError(problems[0])
        if state.format == FORMAT and state.crc32 != crc32(_canonical(raw)):
            raise ValueError("it is not what was written: its checksum differs")
        named = re.fullmatch(r"step_(\d{9,})", checkpoint.name)
        if named and int(named[1]) != state.step:
            raise ValueError(f"it is of step {state.step}, the folder is named for another")
    except (OSError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise Damaged(checkpoint, f"{file} is damaged ({reason[:300]})") from None
    return state


def state_json(state: SavedState) -> bytes:
    """What is written to state.json: ``state`` with its checksum."""
    raw = state.model_dump(mode="json")
    return json.dumps({**raw, "crc32": crc32(_canonical(raw))}, separators=(",", ":")).encode()


def read_weights(checkpoint: Path, kind: str, prefix: str = "") -> dict[str, Tensor]:
    """Whole fp32 tensors by parameter name from a checkpoint's files, on the CPU, without any process group.

    ``kind``: "master" for what is trained, "target" for the target encoder. ``prefix`` selects and is cut off. What is
    read is checked: :class:`Damaged` where it is not what was written.
    """
    opened = open_checkpoint(checkpoint)
    weights: dict[str, Tensor] = {}
    for name, slices in opened.holders(kind).items():
        if name.startswith(prefix):
            parts = [file.read(kind, name) for _, _, file in slices]
            weights[name.removeprefix(prefix)] = torch.cat(parts).view(opened.state.shapes[name])
    if not weights:
        raise Damaged(checkpoint, f"{checkpoint} is damaged (it holds nothing of {kind} {prefix}".rstrip() + ")")
    return weights


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps that a checkpoint stands for."""
    return read_state(checkpoint).step


def checkpoint_processes(checkpoint: Path) -> int:
    """The number of processes that wrote a checkpoint."""
    return read_state(checkpoint).processes


def _canonical(raw: dict[str, Any]) -> bytes:
    """What the checksum of state.json is of."""
    rest = {key: value for key, value in raw.items() if key != "crc32"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()


def _check_covered(checkpoint: Checkpoint, kind: str) -> None:
    """Every element of every parameter must be there once: of the target encoder's, of those that any file names."""
    shapes, holders = checkpoint.state.shapes, checkpoint.holders(kind)
    names = holders.keys() if kind == "target" else shapes.keys() | holders.keys()
    for name in sorted(names):
        if name not in shapes:
            raise Damaged(checkpoint.path, f"{checkpoint.path} is damaged ({kind} {name} is no parameter of its model)")
        place, size = 0, math.prod(shapes[name])
        for first, count, _ in holders.get(name, []):
            place = place + count if first == place else -1
            if place < 0:
                break
        if place != size:
            raise Damaged(checkpoint.path, f"{checkpoint.path} is damaged (it lacks elements of {kind} {name})")


# ---------------------------------------------------------------------------------------------------------- the folder


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step_*"):
        with contextlib.suppress(OSError):
            path.rmdir()  # succeeds where it is empty: an earlier version was killed while it removed it


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it is no longer one; it stays until the run has come as far again."""
    aside = checkpoint.with_name(SET_ASIDE + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # of a folder that cannot be written the run will tell when it saves
        checkpoint.rename(aside)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is none from the first moment on."""
    unfinished = checkpoint.with_name(UNFINISHED + checkpoint.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(OSError):
        checkpoint.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def prune(newest: Path, *, keep: int, keep_every: int = 0, keep_step: int = 0) -> None:
    """Keep ``newest``, ``keep`` - 1 before it, those of every ``keep_every``-th step and of ``keep_step``.

    All other older ones are removed.

    Checkpoints after ``newest`` are left alone; damaged ones up to it have served their purpose.
    """
    for old in _spare(_up_to(newest), keep, keep_every, keep_step):
        remove(old)
    for aside in newest.parent.glob(f"{SET_ASIDE}step_*"):
        if aside.name.removeprefix(SET_ASIDE) <= newest.name:
            shutil.rmtree(aside, ignore_errors=True)


def make_room(folder: Path, *, keep: int, keep_every: int = 0, keep_step: int = 0) -> list[Path]:
    """Remove ahead of a save what it would remove afterwards; returns that.

    Nothing where what stays holds no checkpoint that can be read whole.
    """
    found = list_checkpoints(folder)
    spare = _spare(found, max(1, keep - 1), keep_every, keep_step)
    spare += folder.glob(f"{SET_ASIDE}*")
    if not spare or not any(problem_of(path) is None for path in reversed(found) if path not in spare):
        return []
    for old in spare:
        remove(old)
    return spare


def problem_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, all of which is read for it; None where it is whole."""
    try:
        open_checkpoint(checkpoint).verify()
    except Damaged as error:
        return error.what
    except UserError as error:
        return str(error)
    return None


def _up_to(newest: Path) -> list[Path]:
    return [path for path in list_checkpoints(newest.parent) if path.name <= newest.name]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says; 0 where it says none."""
    step = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return int(step[1]) if step else 0


def _spare(checkpoints: list[Path], keep: int, keep_every: int, keep_step: int) -> list[Path]:
    return [path for path in checkpoints[:-keep] if not _lasts(step_of(path), keep_every, keep_step)]


def _lasts(step: int, keep_every: int, keep_step: int) -> bool:
    return step > 0 and (step == keep_step or (keep_every > 0 and step % keep_every == 0))
