"""The target encoder: the moving average of the context encoder, never trained.

Its forward pass runs without gradients in the working dtype.

Shapes: B images, N patches, M target blocks, T tokens of a target block, D encoder width, H x W pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ijepa_ds.engine.moving_average import MovingAverage
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import CONTEXT_ENCODER, mean_of_layers, normalize_targets
from ijepa_ds.method.positions import sine_cosine_positions


class TargetEncoder:
    """The network whose weights are the average's.

    ``encoder`` gives the architecture (on the meta device: its weights are replaced). ``average`` is of the context
    encoder's weights.
    """

    layers = 1  # the last blocks of which targets are the mean

    def __init__(self, encoder: VisionTransformer, average: MovingAverage, *, autocast: torch.dtype | None = None):
        self._average, self._autocast = average, autocast
        weights = average.weights
        for name, view in weights.items():
            _set_parameter(encoder, name.removeprefix(f"{CONTEXT_ENCODER}."), view)
        like = next(iter(weights.values()))
        self.device, self.dtype = like.device, like.dtype
        positions = sine_cosine_positions(encoder.embed_dim, encoder.grid)[None]
        _set_parameter(encoder, "pos_embed", positions.to(self.device, self.dtype))
        missing = [name for name, parameter in encoder.named_parameters() if parameter.device.type == "meta"]
        assert not missing, f"the optimizer's groups lack {missing}"
        self.encoder = encoder.eval()

    def __call__(self, images: Tensor, target_blocks: Tensor) -> Tensor:
        """images [B, 3, H, W], target_blocks [M, B, T] -> targets [M * B, T, D], fp32, layer-normalised."""
        self._average.wait()
        with torch.no_grad(), self.autocast():
            if self.layers > 1:
                return mean_of_layers(self.encoder.layers_at(images, target_blocks, self.layers))
            return normalize_targets(self.encoder.features_at(images, target_blocks))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """All patches' features after the final norm and before the target norm, [B, N, D]."""
        self._average.wait()
        with self.autocast():
            return self.encoder(images)

    def autocast(self) -> AbstractContextManager:
        """Within it products run in the dtype of torch_autocast, if it is on."""
        return torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()


def _set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
