"""The target encoder: an exponential moving average of the context encoder, never trained.

The average is kept in fp32, sharded as ZeRO shards the master weights: each rank averages its slice, casts it to the
working dtype and gathers the others' (an average kept in bf16 barely moves: at momentum 0.996 a step is smaller than
bf16 can resolve). The forward pass runs without gradients in the working dtype.

Shapes: B images, N patches, M target blocks, T tokens of a target block, D encoder width, H x W pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa_ds.engine.shards import MasterShard
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import ENCODER, select_targets
from ijepa_ds.method.positions import sine_cosine_positions


class TargetEncoder:
    """Starts as a copy of the context encoder whose masters are in ``shards``.

    ``encoder`` gives the architecture (on the meta device: its weights are replaced). ``averages`` [P] per shard is the
    state of this object.
    """

    def __init__(self, encoder: VisionTransformer, shards: list[MasterShard], *, autocast: torch.dtype | None = None):
        self.shards = [shard for shard in shards if shard.group.startswith(ENCODER)]
        self.averages = [shard.master.detach().clone() for shard in self.shards]
        self._weights = [torch.empty_like(shard.weights) for shard in self.shards]
        self._pending: list[dist.Work] = []
        self._autocast = autocast
        self.device, self.dtype = self._weights[0].device, self._weights[0].dtype
        for shard, weights in zip(self.shards, self._weights, strict=True):
            for placement in shard.placements:
                view = weights[placement.start : placement.stop].view(placement.shape)
                _set_parameter(encoder, placement.name.removeprefix(f"{ENCODER}."), view)
        positions = sine_cosine_positions(encoder.embed_dim, encoder.grid)[None]
        _set_parameter(encoder, "pos_embed", positions.to(self.device, self.dtype))
        missing = [name for name, parameter in encoder.named_parameters() if parameter.device.type == "meta"]
        assert not missing, f"the optimizer's groups lack {missing}"
        self.encoder = encoder.eval()
        self.publish()

    def __call__(self, images: Tensor, target_blocks: Tensor) -> Tensor:
        """images [B, 3, H, W], target_blocks [M, B, T] -> targets [M * B, T, D], fp32, layer-normalised."""
        with torch.no_grad():
            return select_targets(self.features(images), target_blocks)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """All patches' features after the final norm and before the target norm, [B, N, D]."""
        self._wait()
        with self._autocast_context():
            return self.encoder(images)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * context, in fp32 on this rank's slices, then published."""
        torch._foreach_lerp_(self.averages, [shard.master for shard in self.shards], 1.0 - momentum)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the working weights of every rank up to the averages; the next forward pass waits for it."""
        self._wait()
        works = [s.publish(a, w) for s, a, w in zip(self.shards, self.averages, self._weights, strict=True)]
        self._pending = [work for work in works if work is not None]

    def _wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending = []

    def _autocast_context(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()


def _set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
