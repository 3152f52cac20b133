"""What is measured side by side: the trained encoder, the same at random initialisation, and raw pixels.

Shapes: B images, H x W pixels, N patches, D encoder width, F features of an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.build import build_encoder, input_of_encoder, working_dtype
from ijepa_ds.config import Config
from ijepa_ds.distributed import Process, from_main
from ijepa_ds.evaluation.subject import Subject
from ijepa_ds.hardware import has_fast_bf16
from ijepa_ds.method.encoder import VisionTransformer, set_attention

PIXELS = 16  # raw pixels are compared at 16 x 16
BLOCKS = 4  # whose outputs `last4` holds


@dataclass(frozen=True)
class Candidate:
    """Something that turns images into features; ``views`` names columns of these.

    ``module`` is the transformer itself, for tasks that need more than pooled features, and ``build`` makes it anew in
    float32, to be trained; None for raw pixels.
    """

    name: str  # "trained", "random" or "pixels"
    seed: int
    views: dict[str, slice]
    forward: Callable[[Tensor], Tensor]  # uint8 [B, H, W, 3] on the device -> [B, F]
    module: VisionTransformer | None = None
    build: Callable[[], VisionTransformer] | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.seed}" if self.name == "random" else self.name


def computing_dtype(config: Config, process: Process) -> torch.dtype:
    """What the encoders compute in: the run's dtype, but fp32 where bf16 is emulated and takes many times as long."""
    fast = working_dtype(config) != torch.bfloat16 or from_main(has_fast_bf16(process.device), process)
    return working_dtype(config) if fast else torch.float32


def candidates(subject: Subject, process: Process, dtype: torch.dtype, *, random_seeds: int) -> Iterator[Candidate]:
    """One after the other, so that one is in memory at a time: trained, random ones, pixels."""
    config = subject.config
    for name, seed in [("trained", 0), *(("random", seed) for seed in range(random_seeds))]:
        build = functools.partial(_build, subject, seed, trained=name == "trained", device=process.device)
        module = build().to(process.device, dtype).eval().requires_grad_(False)
        views = {"last": slice(-module.embed_dim, None), "last4": slice(None)}
        yield Candidate(name, seed, views, pooled_features(module, config), module, build)
    yield Candidate("pixels", 0, {"pixels": slice(None)}, small_pixels)


def _build(subject: Subject, seed: int, *, trained: bool, device: torch.device) -> VisionTransformer:
    config = subject.config
    module = build_encoder(config, torch.Generator().manual_seed(config.ijepa.run.seed + seed))
    set_attention(module, fused=device.type == "cuda")
    if trained:
        module.load_state_dict(subject.weights)
    return module


def pooled_features(module: VisionTransformer, config: Config) -> Callable[[Tensor], Tensor]:
    """Uint8 images [B, H, W, 3] -> the last four blocks' normed features, averaged over patches: [B, 4 D], fp32.

    The last block's come last. An encoder of fewer blocks gives all it has.
    """
    weight, blocks_out = module.patch_embed.proj.weight, min(BLOCKS, len(module.blocks))
    prepare = input_of_encoder(config, weight.device, weight.dtype)

    def forward(images: Tensor) -> Tensor:
        blocks = module(prepare(images), blocks_out=blocks_out)
        return torch.cat([block.float().mean(1) for block in (blocks if blocks_out > 1 else [blocks])], dim=1)

    return forward


def small_pixels(images: Tensor) -> Tensor:
    """Uint8 images [B, H, W, 3] -> [B, 3 * 16 * 16], from 0 to 1."""
    return F.interpolate(images.permute(0, 3, 1, 2).float() / 255, size=(PIXELS, PIXELS), mode="area").flatten(1)
