"""Which weights an evaluation measures: the target encoder of a run, of one of its checkpoints, or a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ijepa_ds.build import build_encoder, encoder_dimensions
from ijepa_ds.config import Config, load_config, parse_config
from ijepa_ds.engine.checkpoint_files import checkpoint_step
from ijepa_ds.errors import UserError, some
from ijepa_ds.exchange.export import target_encoder_weights
from ijepa_ds.exchange.inferred_config import infer_config
from ijepa_ds.exchange.read import read_encoder
from ijepa_ds.exchange.sizes import shape_differences, shapes_of
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.run.folder import find_checkpoint, read_run_config


@dataclass(frozen=True)
class Subject:
    """The encoder to measure: its configuration, its state dict under timm's names, and where it is from."""

    config: Config
    weights: dict[str, Tensor]
    source: str
    path: Path  # the file or folder that was read
    folder: Path  # where results belong
    step: int = 0
    role: str = "target"  # or "context" or "unknown", of a file of others

    def describe(self) -> str:
        """Which encoder of what."""
        unknown = self.role == "unknown"
        encoder = "an encoder that does not say which it is" if unknown else f"the {self.role.upper()} encoder"
        return f"{encoder} of {self.source}"


def load_subject(
    path: Path, config_path: str | None = None, *, image_size: int | None = None, heads: int | None = None
) -> Subject:
    """Find the encoder behind ``--checkpoint``: a run folder (newest checkpoint), a checkpoint, or a file of others.

    Of what holds several encoders the target encoder is taken. A file needs no configuration where its tensors tell all
    sizes.

    Args:
        path: what to read; see :func:`ijepa_ds.exchange.read.read_encoder` for the formats of others.
        config_path: a configuration, for a file.
        image_size: evaluate at another size than it was built for; positions are computed anew for the other grid.
        heads: number of attention heads, where nothing tells it.

    Raises:
        UserError: nothing there, damaged, or of another architecture.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, such as runs/scenes_tiny")
    others = path.is_file() or (path / "model.safetensors").is_file()
    subject = _from_others(path, config_path, heads) if others else _from_run(path)
    config, patch = subject.config, subject.config.ijepa.model.patch_size
    if image_size is not None:
        if image_size < patch or image_size % patch:
            raise UserError(f"--image-size {image_size} must be a multiple of the encoder's patches of {patch} pixels")
        config = config.changed("data", image_size=(image_size, image_size))
    # Positions are fixed, so they need not be read.
    positions = sine_cosine_positions(subject.weights["norm.weight"].shape[0], config.grid)[None]
    weights = {**subject.weights, "pos_embed": positions}
    with torch.device("meta"):
        expected = build_encoder(config).state_dict()
    if problems := shape_differences(shapes_of(weights), shapes_of(expected)):
        raise UserError(f"{path} does not fit the configuration, give the one it was trained with: {some(problems)}")
    return dataclasses.replace(subject, config=config, weights=weights)


def _from_others(path: Path, config_path: str | None, heads: int | None) -> Subject:
    config = None if config_path is None else load_config(config_path)
    if config is not None and path.is_file():  # a transformers folder tells its own
        heads = encoder_dimensions(config).heads if heads is None else heads
    encoder = read_encoder(path, heads=heads)
    if config is None:
        raw, _ = infer_config(encoder)
        raw["ijepa"]["run"] = {"name": path.name}
        config = parse_config(raw, source=f"the configuration inferred from {path}")
    folder = (path.parent if path.is_file() else path) / "evaluation"
    return Subject(config, encoder.weights, encoder.source, path, folder, role=encoder.role)


def _from_run(path: Path) -> Subject:
    run, checkpoint = find_checkpoint(path)
    config, step = read_run_config(run), checkpoint_step(checkpoint)
    weights = target_encoder_weights(checkpoint, config.grid)
    return Subject(config, weights, f"{run} at step {step}", checkpoint, run / "evaluation", step)
