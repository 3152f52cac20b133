"""An encoder of a run's checkpoint, under timm's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.engine.checkpoint_files import checkpoint_step, read_weights
from ijepa_ds.engine.trainable import TARGET
from ijepa_ds.method.ijepa import CONTEXT_ENCODER
from ijepa_ds.method.positions import sine_cosine_positions

DESCRIPTIONS = {
    "target": "target (the moving average, which is what I-JEPA evaluates)",
    "context": "context (what the optimizer trains; I-JEPA evaluates the target encoder)",
}


@dataclass(frozen=True)
class RunEncoder:
    """An encoder of a run's checkpoint, with positions for images of a size.

    ``role``: "target" or "context". ``image_size``: (rows, columns) in pixels.
    """

    checkpoint: Path
    config: Config
    role: str
    image_size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.config.ijepa.model.patch_size
        return self.image_size[0] // patch, self.image_size[1] // patch

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.checkpoint.resolve().parents[1]

    @property
    def step(self) -> int:
        """The optimizer steps that it has seen."""
        return checkpoint_step(self.checkpoint)

    def weights(self) -> dict[str, Tensor]:
        """fp32 state dict under timm's names, positions included."""
        return encoder_weights(self.checkpoint, self.grid, self.role)

    def metadata(self) -> dict[str, str]:
        """Texts for the file's head: which encoder of which run it holds."""
        return {
            "format": "pt",
            "encoder": DESCRIPTIONS[self.role],
            "run": self.config.ijepa.run.name,
            "step": str(self.step),
        }


def encoder_weights(checkpoint: Path, grid: tuple[int, int], role: str) -> dict[str, Tensor]:
    """The fp32 state dict of the "target" or the "context" encoder under timm's names, positions in full precision."""
    weights = read_weights(checkpoint, TARGET if role == "target" else "master", f"{CONTEXT_ENCODER}.")
    width = weights["norm.weight"].shape[0]
    return {"pos_embed": sine_cosine_positions(width, grid)[None], **weights}
