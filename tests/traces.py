"""Records a trace as another implementation would: plain torch, its own schedules, its own average of every tensor.

Of the package it takes the networks' architecture alone (other tests compare that with timm); optimizer groups,
schedules, loss, target norm and moving average are written out here.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch

from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.predictor import Predictor

RECIPE = {
    "iterations_per_epoch": 2,
    "epochs": 3,
    "warmup_epochs": 1,
    "lr": {"start": 2e-4, "peak": 1e-3, "final": 1e-6},
    "weight_decay": [0.04, 0.4],
    "ema": [0.9, 1.0],
}


def record_trace(
    folder: Path,
    *,
    name: str = "trace",
    image_size: int | list[int] = 16,
    patch_size: int = 4,
    encoder: tuple[int, int, int, int] = (16, 2, 2, 64),
    predictor: tuple[int, int, int] = (8, 1, 2),
    batch_size: int = 2,
    targets: int = 4,
    steps: int = 3,
) -> Path:
    """Write NAME.npz and NAME.json to ``folder``; returns the .npz.

    ``encoder`` and ``predictor``: width, depth, heads (and hidden width). Sizes of context and targets change from step
    to step.
    """
    torch.manual_seed(0)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    width, depth, heads, hidden = encoder
    context = VisionTransformer(size, patch_size, Dimensions(width, depth, heads, hidden))
    narrow = Predictor(context.grid, width, width=predictor[0], depth=predictor[1], heads=predictor[2])
    target = copy.deepcopy(context).requires_grad_(False)
    arrays = {f"init/encoder/{key}": value.numpy().copy() for key, value in context.state_dict().items()}
    arrays |= {f"init/predictor/{key}": value.numpy().copy() for key, value in narrow.state_dict().items()}
    trained = [p for part in (context, narrow) for p in part.parameters() if p.requires_grad]
    groups = [[p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1.0)
    rows = []
    for step in range(steps):
        images = torch.randn(batch_size, 3, *size)
        orders = torch.stack([torch.randperm(math.prod(context.grid)) for _ in range(batch_size)])
        seen = orders[:, : 3 + step]
        blocks = torch.stack([orders[:, 4 + m : 7 + m + step % 2] for m in range(targets)])
        tokens, features, predictions, loss = losses_of(context, narrow, target, images, seen, blocks)
        rows.append({"step": step, **rates_at(step), "loss": loss.item()})
        rows[-1] |= update(context, narrow, target, optimizer, loss, rates_at(step))
        arrays[f"step{step}/images"] = images.numpy()
        arrays[f"step{step}/context_masks"] = seen[None].numpy().astype(np.int16)
        arrays[f"step{step}/target_masks"] = blocks.numpy().astype(np.int16)
        if step == 0:
            arrays["step0/target_features"] = features.numpy()
            arrays["step0/context_features"] = tokens.detach().numpy()
            arrays["step0/predictions"] = predictions.detach().numpy()
    for key, part in (("encoder", context), ("predictor", narrow), ("target_encoder", target)):
        arrays |= {f"final/{key}/{n}": value.numpy() for n, value in part.state_dict().items()}
    np.savez(folder / f"{name}.npz", **arrays)
    settings = {
        "name": name,
        "image_size": image_size,
        "patch_size": patch_size,
        "encoder": dict(zip(("dim", "depth", "heads"), encoder, strict=False)),
        "predictor": dict(zip(("dim", "depth", "heads"), predictor, strict=True)),
        "batch_size": batch_size,
        "targets": targets,
        **RECIPE,
        "steps": rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(settings))
    return folder / f"{name}.npz"


def losses_of(
    context: VisionTransformer,
    narrow: Predictor,
    target: VisionTransformer,
    images: torch.Tensor,
    seen: torch.Tensor,
    blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """METHOD: the context encoder's tokens, the target's normed features, the predictions and their smooth L1 loss."""
    with torch.no_grad():
        features = target(images)
        variance = features.var(-1, correction=0, keepdim=True)
        features = (features - features.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    wanted = torch.cat([torch.stack([f[i] for f, i in zip(features, block, strict=True)]) for block in blocks])
    tokens = context(images, seen)
    predictions = narrow(tokens, seen, blocks)
    errors = (predictions - wanted).abs()
    return tokens, features, predictions, torch.where(errors < 1, errors**2 / 2, errors - 0.5).mean()


def update(
    context: VisionTransformer,
    narrow: Predictor,
    target: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    rates: dict[str, float],
) -> dict[str, float]:
    """METHOD: one optimizer step and the moving average after it; returns the norms of the gradients."""
    optimizer.zero_grad()
    loss.backward()
    norms = {
        f"grad_norm_{key}": math.sqrt(sum(float((p.grad**2).sum()) for p in part.parameters() if p.requires_grad))
        for key, part in (("encoder", context), ("predictor", narrow))
    }
    for group, decay in zip(optimizer.param_groups, (rates["weight_decay"], 0.0), strict=True):
        group.update(lr=rates["lr"], weight_decay=decay)
    optimizer.step()
    with torch.no_grad():
        for average, weight in zip(target.parameters(), context.parameters(), strict=True):
            average.mul_(rates["momentum"]).add_(weight, alpha=1 - rates["momentum"])
    return norms


def rates_at(step: int) -> dict[str, float]:
    """METHOD: lr and weight decay count from 1, the momentum from 0."""
    warmup, total = RECIPE["iterations_per_epoch"], RECIPE["epochs"] * RECIPE["iterations_per_epoch"]
    lr, count = RECIPE["lr"], step + 1
    if count < warmup:
        rate = lr["start"] + count / warmup * (lr["peak"] - lr["start"])
    else:
        share = (count - warmup) / (total - warmup)
        rate = lr["final"] + (lr["peak"] - lr["final"]) * (1 + math.cos(math.pi * share)) / 2
    first, last = RECIPE["weight_decay"]
    decay = last + (first - last) * (1 + math.cos(math.pi * count / total)) / 2
    low, high = RECIPE["ema"]
    return {"lr": rate, "weight_decay": decay, "momentum": low + step * (high - low) / total}
