"""Weights in other projects' formats. The tensor names are timm's, so a plain state dict goes both ways."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from ijepa_ds.checkpoint import TARGET, checkpoint_step, list_checkpoints, read_weights
from ijepa_ds.config import Config
from ijepa_ds.errors import UserError
from ijepa_ds.optimizer import ENCODER
from ijepa_ds.positions import sine_cosine_positions
from ijepa_ds.run_folder import read_run_config


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds export``."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds export", description="Write a run's target encoder for timm."
    )
    parser.add_argument("run", help="a run folder; its newest checkpoint is taken")
    parser.add_argument("--out", help="folder to write to (default: the run folder's export/)")
    options = parser.parse_args(arguments)
    run = Path(options.run)
    config = read_run_config(run)
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run} has no checkpoint yet; train first: deepspeed run.py --config FILE.json")
    path = export_timm(found[-1], config, Path(options.out) if options.out else run / "export")
    print(f"written: {path}, the TARGET encoder of {found[-1]}")
    return 0


def target_encoder_weights(checkpoint: Path, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The target encoder's fp32 state dict under timm's names, positions in full precision."""
    weights = read_weights(checkpoint, TARGET, f"{ENCODER}.")
    width = weights["norm.weight"].shape[0]
    return {"pos_embed": sine_cosine_positions(width, grid)[None], **weights}


def export_timm(checkpoint: Path, config: Config, folder: Path) -> Path:
    """Write the target encoder as safetensors that ``timm.create_model(..., checkpoint_path=...)`` loads strictly."""
    weights = target_encoder_weights(checkpoint, config.grid)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "target_encoder.safetensors"
    metadata = {
        "format": "pt",
        "encoder": "target (the moving average, which is what I-JEPA evaluates)",
        "run": config.ijepa.run.name,
        "step": str(checkpoint_step(checkpoint)),
    }
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, metadata=metadata)
    os.replace(temporary, path)
    return path
