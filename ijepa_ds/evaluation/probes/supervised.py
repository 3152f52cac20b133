"""Supervised training of one or several classifiers over inputs that the caller makes, and their predictions.

The gradients of several processes are summed and divided by the images of all, so any number of processes and any
micro-batch take the same steps, up to summation order.

Shapes: B images that this process contributes to a step, G classifiers, C classes, n images measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.distributed import Process, average_gradients, gather_rows
from ijepa_ds.errors import UserError
from ijepa_ds.method.schedules import warmup_cosine
from ijepa_ds.progress import Progress

Logits = Callable[[Tensor], Tensor]  # inputs [b, ...] -> logits [G, b, C]
Validation = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # inputs, labels: this process's stride of all, in order


class Inputs(Protocol):
    """What is trained on."""

    batch: int  # images of a step over all processes
    steps: int  # of an epoch, the same on every process

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's inputs [B, ...] and labels [B] of each step."""


@dataclass(frozen=True)
class Training:
    """How long and in what portions. ``micro_batch``: images that are computed at once; their gradients add up."""

    epochs: int
    micro_batch: int
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0


def fit(
    logits: Logits,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    training: Training,
    *,
    num_classifiers: int,
    process: Process,
    name: str,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> float:
    """Train with a linear warm-up and a cosine to zero; each parameter group brings its own ``peak_lr``.

    Args:
        logits: computed under bf16 autocast on a GPU, in float32 on a CPU.
        num_classifiers: G.
        name: of the work, for its lines of progress.
        after_epoch: called with the number of epochs done.

    Returns:
        Images per second of all processes, training only.

    Raises:
        UserError: no epochs, or the loss of every classifier is NaN or infinite.
    """
    if training.epochs < 1:
        raise UserError(f"{name} with {training.epochs} epochs trains nothing: give at least 1")
    total_steps = training.epochs * inputs.steps
    warmup_steps = int(training.warmup_epochs * inputs.steps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    progress = Progress(total_steps * inputs.batch, name=name, enabled=process.is_main)
    step, note = 0, ""
    for epoch in range(training.epochs):
        loss, num_images = torch.zeros(num_classifiers, device=process.device), 0
        for rows, labels in inputs.epoch(epoch):
            # One step longer than the run, so that the last step still moves.
            factor = warmup_cosine(step + 1, warmup_steps=warmup_steps, horizon=total_steps + 1)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            size = training.micro_batch
            for part, part_labels in zip(rows.split(size), labels.split(size), strict=True):
                loss += _backward(logits, part, part_labels, training.label_smoothing, process.device)
            num_images += average_gradients(parameters, len(rows), process)
            optimizer.step()
            step += 1
            progress.show(step * inputs.batch, note)
        mean_loss = _sum_over_ranks(loss, process) / num_images  # [G]: the epoch's only wait for the device
        finite = mean_loss[torch.isfinite(mean_loss)]
        if not len(finite):
            raise UserError(f"{name} diverged in epoch {epoch + 1}: its loss is no number; take a lower learning rate")
        note = f"epoch {epoch + 1} of {training.epochs}, loss {float(finite.min()):.3f}"
        with progress.paused():
            after_epoch(epoch + 1)
    progress.end(step * inputs.batch, note)
    return progress.rate(step * inputs.batch)


@torch.no_grad()
def predict(
    logits: Logits, validation: Iterable[tuple[Tensor, Tensor]], *, num_classifiers: int, process: Process
) -> tuple[Tensor, Tensor]:
    """Classes that each classifier predicts [G, n] (-1 where its logits are no numbers) and the labels [n], on the CPU.

    The processes share the images as a stride deals them out (``samples[rank::world_size]``); all get all.
    """
    # Something to gather also where there are fewer images than processes.
    predictions = [torch.empty(0, num_classifiers, dtype=torch.int64)]
    truth = [torch.empty(0, dtype=torch.int64)]
    for inputs, labels in validation:
        with autocast(process.device):
            scores = logits(inputs.to(process.device, non_blocking=True)).float()  # [G, B, C]
        classes = scores.argmax(dim=2).where(torch.isfinite(scores).all(dim=2), -1)
        predictions.append(classes.T.cpu())
        truth.append(labels.long().cpu())
    return gather_rows(torch.cat(predictions), process).T, gather_rows(torch.cat(truth), process)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; a CPU computes in float32, where bf16 would be slower on most."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _backward(logits: Logits, inputs: Tensor, labels: Tensor, smoothing: float, device: torch.device) -> Tensor:
    """Adds the gradients of the summed loss; returns the loss summed over images [G]."""
    with autocast(device):
        scores = logits(inputs.to(device, non_blocking=True))
    targets = labels.to(device, torch.int64).expand(len(scores), -1)  # [G, b]
    loss = F.cross_entropy(
        scores.float().flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    ).view(targets.shape)
    loss.sum().backward()  # they share no parameter that is trained, so each gets the gradient of its own loss
    return loss.detach().sum(dim=1)


def _sum_over_ranks(values: Tensor, process: Process) -> Tensor:
    values = values.float().cpu()
    if process.world_size > 1:
        dist.all_reduce(values, group=process.control)
    return values
