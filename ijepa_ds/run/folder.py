"""The folder of a run: effective configuration, versions, checkpoints, scalars, pictures, the exported encoder."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ijepa_ds.config import Config, parse_config
from ijepa_ds.engine.checkpoint_files import checkpoint_step, list_checkpoints, remove_incomplete, step_of
from ijepa_ds.errors import UserError, listing
from ijepa_ds.files import replacing
from ijepa_ds.run.provenance import git_commit, versions
from ijepa_ds.settings import OptimizationConfig
from ijepa_ds.validation import Checked, read_json

# Where a run with a constant learning rate ends is decided late.
_ENDS = ("ijepa.optimization.epochs", "ijepa.optimization.cooldown_epochs")
VISIBLE = 10.0  # seconds until a file written on one node must be seen on all others


class RunRecord(Checked):
    """Of a run's config.json the part that is read again: configuration, number of images, what it was made with."""

    model_config = ConfigDict(extra="ignore")

    config: dict[str, Any]
    images: Annotated[int, Field(ge=0)] | None
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str = "unknown"


class RunFolder:
    """``runs/NAME``: config.json, checkpoints/, export/, metrics.jsonl, pictures/ and TensorBoard's files."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.ijepa.run.folder) / config.ijepa.run.name
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"

    def check_writable(self) -> None:
        """Refuse a place where nothing can be written, before anything is built. Reads only."""
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            reason = "is not writable" if nearest.is_dir() else "is not a folder"
            raise UserError(f"{self.path} cannot be written ({nearest} {reason}); choose another ijepa.run.folder")

    def check_belongs(self, config: Config, num_images: int) -> None:
        """Refuse a folder that holds another run, or a start from one: what differs is listed. Reads only.

        A folder that weights were imported into has not seen its images yet: any number of them belongs to it.
        """
        if found := list_checkpoints(self.checkpoints):
            if not (self.path / "config.json").exists():
                raise UserError(f"{self.path} holds checkpoints but no config.json; choose another ijepa.run.name")
            if differing := _differing(self.path, step_of(found[-1]), config, num_images):
                raise UserError(
                    f"{self.path} belongs to a run with another configuration; choose another ijepa.run.name, or "
                    f"remove the folder to start over. What differs:{listing(differing)}"
                )
        elif (start := self.start(config)) is not None:  # a folder without a checkpoint has nothing to protect
            there = find_checkpoint(start)[0]
            if differing := _differing(there, checkpoint_step(start), config, num_images, free=("ijepa.run.name",)):
                raise UserError(
                    f"{start} (ijepa.run.start_from) is of another recipe, which cannot be gone on with; take over its "
                    f"settings, or leave ijepa.run.start_from out. What differs:{listing(differing)}"
                )

    def start(self, config: Config) -> Path | None:
        """The checkpoint of another run to begin with, if that was asked for and there is none of this run's own."""
        start = config.ijepa.run.start_from
        return None if start is None or list_checkpoints(self.checkpoints) else find_checkpoint(Path(start))[1]

    def prepare(self, config: Config, num_images: int | None) -> dict[str, Any]:
        """Make the folder, remove what a killed process left half written, record configuration and versions.

        ``num_images``: of the training data; None where it is not known yet.
        """
        record = {"config": config.as_dict(), "images": num_images, "versions": versions(), "commit": git_commit()}
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_incomplete(self.checkpoints)
            with replacing(self.path / "config.json") as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); choose another ijepa.run.folder") from error
        return record

    def leave_mark(self) -> str:
        """Make a file in the folder and give its name: whoever sees it (:meth:`sees`) has the same folder."""
        mark = f".{uuid.uuid4().hex}.start"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / mark).touch()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); choose another ijepa.run.folder") from error
        return mark

    def sees(self, mark: str, seconds: float = VISIBLE) -> bool:
        """Whether the file is here: a network file system may show it late."""
        end = time.monotonic() + seconds
        while not (self.path / mark).exists():
            if time.monotonic() > end:
                return False
            for folder in (self.path, *self.path.absolute().parents):
                with contextlib.suppress(OSError):
                    os.listdir(folder)  # has what was remembered of it looked up again
            time.sleep(0.1)
        return True

    def remove_mark(self, mark: str) -> None:
        """Remove the file, and the folder where nothing else is in it."""
        with contextlib.suppress(OSError):
            (self.path / mark).unlink()
            self.path.rmdir()

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, if there is one."""
        return next(reversed(list_checkpoints(self.checkpoints)), None)


def _differing(path: Path, step: int, config: Config, num_images: int, *, free: tuple[str, ...] = ()) -> list[str]:
    """A line for each setting that does not allow ``config`` to go on after ``step`` steps of the run in ``path``.

    ``free``: settings that may differ.
    """
    saved, saved_images = read_run_record(path)
    then, now = saved.recipe(), config.recipe()
    if _may_end_elsewhere(saved, config, num_images, path, step):
        free += _ENDS
    for key in free:
        now[key] = then[key]
    if saved_images is not None:
        then["images in ijepa.data.train"], now["images in ijepa.data.train"] = saved_images, num_images
    return [
        f"{key}: {json.dumps(then.get(key))} there, {json.dumps(now.get(key))} here"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _may_end_elsewhere(saved: Config, config: Config, num_images: int, path: Path, step: int) -> bool:
    """Whether the run in ``path`` may get another length after ``step`` steps: its past would have been the same.

    Raises:
        UserError: it would but for its cool-down, which has begun.
    """
    then, now = saved.ijepa.optimization, config.ijepa.optimization
    if then.schedule != "constant_then_cooldown" or then.schedule != now.schedule:
        return False
    if (then.epochs, then.cooldown_epochs) == (now.epochs, now.cooldown_epochs):
        return True
    steps_per_epoch = num_images // config.global_batch
    began = min(first_step_of_cooldown(part.ijepa.optimization, steps_per_epoch) for part in (saved, config))
    if step <= began:
        return True
    raise UserError(
        f"{path} has a checkpoint of step {step}, after its cool-down began or would have begun at step {began}: its "
        "length can no longer change. To go on from before, choose another ijepa.run.name and give a checkpoint of at "
        f"most that step: --set ijepa.run.start_from={path}/checkpoints/step_N"
    )


def first_step_of_cooldown(optimization: OptimizationConfig, steps_per_epoch: int) -> int:
    """The first step whose learning rate depends on where the run ends; 0 for a cosine, of which every one does."""
    if optimization.schedule == "cosine":
        return 0
    return int(optimization.epochs * steps_per_epoch) - int(optimization.cooldown_epochs * steps_per_epoch)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint) of a run folder, whose newest checkpoint is taken, or of one of its checkpoints."""
    if (path / "state.json").is_file():
        return path.resolve().parent.parent, path
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.json; give one, or its checkpoints/step_N")
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise UserError(f"{path} has no checkpoint yet; train first: deepspeed run.py --config FILE.json")
    return path, checkpoints[-1]


def read_run_config(path: Path) -> Config:
    """The configuration that a run was started with, from its folder."""
    return read_run_record(path)[0]


def read_run_record(path: Path) -> tuple[Config, int | None]:
    """A run's configuration and number of training images, None where weights were imported and not trained yet."""
    record = _read_record(path)
    return parse_config(record.config, source=str(path / "config.json")), record.images


def read_run_origin(path: Path) -> tuple[dict[str, str], str]:
    """What a run was last started with: versions by package, and the commit or "unknown"."""
    record = _read_record(path)
    return record.versions, record.commit


def _read_record(path: Path) -> RunRecord:
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run folder: it has no config.json")
    cure = f"put back what the run wrote, or move {path} away"
    return read_json(RunRecord, file, f"is not what a run writes; {cure}", cure)
