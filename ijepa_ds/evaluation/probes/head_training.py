"""Training a grid of heads in one pass over the data, on features made once or anew for each augmented image.

What is learnt depends neither on the micro-batch nor on the number of processes: batches are functions of the seed and
the epoch, and BatchNorm sees whole batches.

Shapes: m validation images, F features, H heads.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.probes.heads import HeadGrid
from ijepa_ds.evaluation.probes.recipes import Recipe
from ijepa_ds.progress import Progress

PREDICT_ROWS = 4096


@dataclass(frozen=True)
class TrainedHeads:
    """All heads of a grid, each measured once at the end."""

    grid: list[dict[str, Any]]  # each head with its "value", percent of validation
    predictions: Tensor  # [m, H], in the order of the grid
    images_per_second: float  # of training


def train_heads(
    inputs: Inputs,
    validation: tuple[Tensor, Tensor],
    *,
    views: dict[str, slice],
    num_classes: int,
    recipe: Recipe,
    process: Process,
    seed: int,
    progress: Progress,
) -> TrainedHeads:
    """Train all heads of ``recipe`` together and measure them at the end. All processes call this together.

    Args:
        inputs: features [B, F] of the training images, in batches of the recipe's size.
        validation: features [m, F] and labels [m].
        views: names of columns of the features; each has heads of its own.
        num_classes: labels are 0 to this, exclusive.
        recipe: heads, optimizer and schedule.
        seed: of the heads' initial weights.
        progress: is shown the training images.
    """
    features, labels = validation
    heads, columns = recipe.heads(tuple(views)), features.shape[1]
    grid = HeadGrid(heads, views, columns, num_classes, optimizer=recipe.optimizer, process=process, seed=seed)
    began, step, note = time.monotonic(), 0, ""
    for epoch in range(recipe.epochs):
        loss = torch.full((1,), torch.nan)
        for rows, targets in inputs.epoch(epoch):
            factor = recipe.lr_factor(step, inputs.steps)
            loss = grid.step(rows, targets.to(process.device), total=recipe.batch, lr_factor=factor)
            step += 1
            progress.show(step * recipe.batch, note)
        lowest = float(torch.where(loss.isfinite(), loss, torch.inf).min())
        note = f"lowest loss of {len(heads)} heads {lowest:.4f}"
    progress.end(step * recipe.batch, note)
    rate = step * recipe.batch / (time.monotonic() - began)
    predictions = grid.predict(features.split(PREDICT_ROWS))  # [m, H]
    values = (100.0 * (predictions == labels[:, None]).double().mean(dim=0)).tolist()
    scored = [{**asdict(head), "value": value} for head, value in zip(grid.order, values, strict=True)]
    return TrainedHeads(scored, predictions, rate)
