"""Configurations and made-up batches for the benchmarks that take training steps.

Shapes: B images, K context tokens, M target blocks, T tokens of a target block, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor

from ijepa_ds.build import build_sampler
from ijepa_ds.config import Config, apply_override, load_config, parse_config
from ijepa_ds.method.masks import MaskSampler

TINY: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6},
    "ijepa": {
        "run": {"name": "benchmark"},
        "data": {"train": "none", "image_size": 32, "workers": 1},
        "model": {
            "encoder": "tiny",
            "width": 32,
            "depth": 2,
            "heads": 2,
            "patch_size": 4,
            "predictor_width": 16,
            "predictor_depth": 2,
        },
        "optimization": {"epochs": 4, "warmup_epochs": 1},
        "monitor": {"log_steps": 1, "health_steps": 0, "picture_steps": 0, "knn_epochs": 0},
        "checkpoint": {"minutes": 0, "keep": 20},
        "compile": False,  # takes minutes, where a run takes seconds
    },
}


@dataclass(frozen=True)
class MadeUpBatch:
    """A micro-batch of noise with masks as the sampler draws them."""

    images: Tensor  # uint8 [B, H, W, 3]
    context_block: Tensor  # int64 [B, K]
    target_blocks: Tensor  # int64 [M, B, T]
    keys: Tensor | None = None


def config_of(name: str, **changes: Any) -> Config:
    """A file of ds_configs/, or "tiny"; ``changes`` by dotted key, with ``__`` for the dot."""
    settings = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    if name != "tiny":
        return load_config(measure.ROOT / "ds_configs" / f"{name}.json", settings)
    return parse_config(raw_tiny(**changes))


def raw_tiny(**changes: Any) -> dict[str, Any]:
    """The tiny configuration as it would stand in a file."""
    raw = json.loads(json.dumps(TINY))
    for key, value in changes.items():
        apply_override(raw, f"{key.replace('__', '.')}={json.dumps(value)}")
    return raw


def batch_of(config: Config, *, step: int, device: torch.device, size: int = 0) -> MadeUpBatch:
    """A batch of ``size`` images (the micro-batch, if 0) with the masks of ``step``."""
    size = size or config.micro_batch
    sampler = build_sampler(config)
    draws = [sampler.draw(step, sample) for sample in range(size)]
    context_tokens = min(len(context) for context, _ in draws)
    context = np.stack([context[:context_tokens] for context, _ in draws])
    targets = np.stack([targets for _, targets in draws], axis=1)
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (size, *config.ijepa.data.image_size, 3), dtype=torch.uint8, generator=generator)
    return MadeUpBatch(
        images.to(device), torch.from_numpy(context).long().to(device), torch.from_numpy(targets).long().to(device)
    )


def step_with(sampler: MaskSampler, target_tokens: int) -> int:
    """The first step whose target blocks have so many tokens."""
    return next(step for step in range(10**6) if sampler.block_sizes(step).target_tokens == target_tokens)


def micro_batches(batch: MadeUpBatch, size: int) -> Iterator[MadeUpBatch]:
    """The batch in parts of ``size`` images."""
    for start in range(0, len(batch.images), size):
        own = slice(start, start + size)
        yield MadeUpBatch(batch.images[own], batch.context_block[own], batch.target_blocks[:, own].contiguous())
