"""Training a grid of heads in one pass over the data, on features made once or anew for each augmented image.

Order, crops and flips are functions of (seed, epoch, sample), and BatchNorm sees whole batches: what is learnt depends
neither on the micro-batch nor on the number of processes.

Shapes: n images, m of validation, F features, H heads, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ijepa_ds.distributed import Process, on_any_rank
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.inputs import TrainingFeatures
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.heads import HeadGrid, steps_per_epoch
from ijepa_ds.evaluation.probes.input_checks import check_features
from ijepa_ds.evaluation.probes.recipes import Recipe
from ijepa_ds.random_streams import permutation

PREDICT_ROWS = 4096


@dataclass(frozen=True)
class TrainedHeads:
    """What became of a grid."""

    grid: list[dict]  # each head with its "value", percent of validation
    predictions: Tensor  # [m], of the best head
    every_prediction: Tensor  # [m, H], in the order of the grid
    seconds: float
    images: int  # that went through, over all epochs


def train_heads(
    training: TrainingFeatures,
    validation: Tensor,
    classes: Classes,
    encoder: Encoder,
    recipe: Recipe,
    *,
    process: Process,
    seed: int,
    say: Callable[[str], None] = print,
) -> TrainedHeads:
    """Train all heads of ``recipe`` together and measure them at the end. All processes call this together.

    Args:
        training: features of the training images.
        validation: features [m, F] of the validation images.
        classes: of both.
        encoder: whose features these are: their width and views.
        seed: of the order and of the heads' initial weights.
        say: takes a line of progress.

    Raises:
        UserError: features that are not finite.
    """
    check_features("validation", validation, classes.validation)
    heads = recipe.heads(tuple(encoder.views))
    grid = HeadGrid(
        heads,
        encoder.views,
        encoder.width,
        classes.num_classes,
        optimizer=recipe.optimizer,
        process=process,
        seed=seed,
    )
    labels = classes.train.to(process.device)
    steps = steps_per_epoch(len(labels), recipe.batch)
    began = told = time.monotonic()
    for epoch in range(recipe.epochs):
        order = permutation(seed, epoch, len(labels))[: steps * recipe.batch].reshape(steps, recipe.batch)
        mine = order[:, process.rank :: process.world_size]
        finite = torch.ones((), dtype=torch.bool, device=process.device)
        for step, rows in enumerate(training.epoch(epoch, mine)):
            finite &= torch.isfinite(rows).all()
            positions = torch.from_numpy(mine[step]).to(process.device)
            factor = recipe.lr_factor(epoch * steps + step, steps)
            loss = grid.step(rows, labels[positions], total=recipe.batch, lr_factor=factor)
        if on_any_rank([not bool(finite)], process)[0]:
            raise UserError("training features hold NaN or infinity: the checkpoint has diverged or is damaged")
        now = time.monotonic()
        if now - told > 30:
            told, done = now, epoch + 1
            rate = done * steps * recipe.batch / (now - began)
            best = float(loss[torch.isfinite(loss)].min()) if bool(torch.isfinite(loss).any()) else float("nan")
            say(f"  epoch {done} of {recipe.epochs}, lowest loss of {len(heads)} heads {best:.4f}, {rate:.0f} images/s")
    seconds = time.monotonic() - began
    predictions = grid.predict(validation.split(PREDICT_ROWS))  # [m, H]
    correct = (predictions == classes.validation[:, None]).sum(dim=0)
    values = [100.0 * int(count) / len(predictions) for count in correct]
    best = max(range(len(values)), key=values.__getitem__)
    return TrainedHeads(
        [{**asdict(head), "value": value} for head, value in zip(grid.order, values, strict=True)],
        predictions[:, best],
        predictions,
        seconds,
        recipe.epochs * steps * recipe.batch,
    )
