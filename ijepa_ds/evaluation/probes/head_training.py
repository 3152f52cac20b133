"""Training a grid of heads in one pass over the data, on features made once or anew for each augmented image.

What is learnt depends neither on the micro-batch nor on the number of processes: batches are functions of the seed and
the epoch, and BatchNorm sees whole batches.

Shapes: B images of a step on this process, m of validation, F features, H heads, C classes.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.probes.heads import HeadGrid
from ijepa_ds.evaluation.probes.recipes import Recipe
from ijepa_ds.progress import Progress

PREDICT_ROWS = 4096


def train_heads(
    inputs: Inputs, validation: Tensor, views: dict[str, slice], recipe: Recipe, progress: Progress
) -> tuple[list[dict[str, Any]], list[Tensor], float]:
    """Train all heads of ``recipe`` together and measure them at the end. All processes call this together.

    Args:
        inputs: features [B, F] of the training images.
        validation: features [m, F].
        views: names of columns of the features; each has heads of its own.
        recipe: heads, optimizer and schedule.
        progress: is shown the training images.

    Returns:
        The heads, the predictions [m] of each, and images per second of training.
    """
    grid = HeadGrid(recipe.heads(tuple(views)), views, validation.shape[1], inputs, optimizer=recipe.optimizer)
    began, step, note = time.monotonic(), 0, ""
    for epoch in range(recipe.epochs):
        for rows, labels in inputs.epoch(epoch):
            factor = recipe.lr_factor(step, inputs.steps)
            loss = grid.step(rows, labels.to(inputs.process.device), total=inputs.batch, lr_factor=factor)
            step += 1
            progress.show(step * inputs.batch, note)
        lowest = float(torch.where(loss.isfinite(), loss, torch.inf).min())
        note = f"lowest loss of {len(grid.order)} heads {lowest:.4f}"
    progress.end(step * inputs.batch, note)
    rate = step * inputs.batch / (time.monotonic() - began)
    predictions = grid.predict(validation.split(PREDICT_ROWS))  # [m, H]
    return [asdict(head) for head in grid.order], list(predictions.unbind(dim=1)), rate
