"""Which weights an evaluation measures: the target encoder of a run, of one of its checkpoints, or a file."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ijepa_ds.build import build_encoder
from ijepa_ds.checkpoint import checkpoint_step, list_checkpoints
from ijepa_ds.config import Config, load_config
from ijepa_ds.errors import UserError
from ijepa_ds.exchange import target_encoder_weights
from ijepa_ds.positions import sine_cosine_positions
from ijepa_ds.run_folder import read_run_config

POSITIONS = "pos_embed"


@dataclass(frozen=True)
class Target:
    """The encoder to measure: its configuration, its state dict under timm's names, and where it is from."""

    config: Config
    weights: dict[str, Tensor]
    source: str
    path: Path  # the file or folder that was read
    folder: Path  # where results belong
    step: int = 0
    encoder: str = "target"


def load_target(path: Path, config_path: str | None = None, *, image_size: int | None = None) -> Target:
    """Find the target encoder behind ``--checkpoint``: a run folder (newest checkpoint), a checkpoint, or a file.

    ``image_size``: evaluate at another size than it was built for; positions are computed anew for the other grid.

    Raises:
        UserError: nothing there, damaged, or of another architecture (with all tensors that differ).
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, such as runs/scenes_tiny")
    target = _from_file(path, config_path) if path.is_file() else _from_run(path)
    config = _resized(target.config, image_size) if image_size is not None else target.config
    width = target.weights["norm.weight"].shape[0] if "norm.weight" in target.weights else 0
    weights = dict(target.weights)
    if width and width % 4 == 0:
        weights[POSITIONS] = sine_cosine_positions(width, config.grid)[None]  # fixed, so they need not be read
    target = dataclasses.replace(target, config=config, weights=weights)
    check_fits(weights, config, path)
    return target


def _from_file(path: Path, config_path: str | None) -> Target:
    if config_path is None:
        raise UserError(f"{path} is a file of weights: name its configuration with --config FILE.json")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    return Target(load_config(config_path), weights, str(path), path, path.parent / "evaluation")


def _from_run(path: Path) -> Target:
    run = path.resolve().parent.parent if (path / "state.json").exists() else path
    config = read_run_config(run)
    checkpoint = path
    if run == path:
        found = list_checkpoints(run / "checkpoints")
        if not found:
            raise UserError(f"{run} has no checkpoint yet; train first: deepspeed run.py --config FILE.json")
        checkpoint = found[-1]
    weights, step = target_encoder_weights(checkpoint, config.grid), checkpoint_step(checkpoint)
    return Target(config, weights, f"{run} at step {step}", checkpoint, run / "evaluation", step)


def check_fits(weights: dict[str, Tensor], config: Config, path: Path) -> None:
    """Raises:
    UserError: a tensor of the configuration's encoder is missing, of another shape, or not known; all are named.
    """
    with torch.device("meta"):
        expected = build_encoder(config).state_dict()
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(expected.keys() | weights.keys(), key=_natural):
        here, there = (tuple(d[name].shape) if name in d else None for d in (expected, weights))
        if here != there:
            difference = f"{there or 'missing'} there, {here or 'unknown'} by the configuration"
            groups.setdefault((re.sub(r"^blocks\.\d+\.", "blocks.*.", name), difference), []).append(name)
    if groups:
        count = sum(map(len, groups.values()))
        named = "; ".join(
            f"{name if len(names) > 1 else names[0]}{f' of {len(names)} blocks' if len(names) > 1 else ''} {difference}"
            for (name, difference), names in groups.items()
        )
        raise UserError(
            f"{path} does not fit the configuration, give the one it was trained with: {count} tensors differ: {named}"
        )


def checksum(path: Path) -> str:
    """sha256 over a file, or over the names and contents of all files of a checkpoint's folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _resized(config: Config, image_size: int) -> Config:
    patch = config.ijepa.model.patch_size
    if image_size < patch or image_size % patch:
        raise UserError(f"--image-size {image_size} must be a multiple of the encoder's patches of {patch} pixels")
    data = dataclasses.replace(config.ijepa.data, image_size=(image_size, image_size))
    return dataclasses.replace(config, ijepa=dataclasses.replace(config.ijepa, data=data))


def _natural(name: str) -> list:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
