"""Supervised training of one or several classifiers on whatever inputs they take, and their predictions.

The gradients of several processes are summed and divided by the images of all, so any number of processes and any
micro-batch take the same steps, up to summation order.

Shapes: B images that this process contributes to a step, G classifiers, C classes, n images measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.distributed import Process, average_gradients, gather_rows, sum_over_ranks
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.method.schedules import warmup_cosine
from ijepa_ds.progress import Progress

Logits = Callable[[Tensor], Tensor]  # inputs [b, ...] -> logits [G, b, C]


@dataclass(frozen=True)
class Course:
    """How long classifiers are trained, and on how many images at once."""

    epochs: int
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    micro_batch: int = 64


def fit(logits: Logits, optimizer: torch.optim.Optimizer, inputs: Inputs, course: Course, progress: Progress) -> float:
    """Train with a linear warm-up and a cosine to zero; each parameter group brings its own ``peak_lr``.

    ``logits`` is called under bf16 autocast on a GPU, in float32 on a CPU. Gradients of micro-batches add up.

    Returns:
        Images per second of all processes.

    Raises:
        UserError: every classifier's loss is NaN or infinite.
    """
    process = inputs.process
    began, step, total = time.monotonic(), 0, course.epochs * inputs.steps
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    warmup, note = int(course.warmup_epochs * inputs.steps), ""
    for epoch in range(course.epochs):
        loss = torch.zeros(1, device=process.device)
        for images, labels in inputs.epoch(epoch):
            # One step longer than the run, so that the last step still moves.
            factor = warmup_cosine(step + 1, warmup_steps=warmup, horizon=total + 1, start=0.0, peak=1.0, final=0.0)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            for part, targets in zip(images.split(course.micro_batch), labels.split(course.micro_batch), strict=True):
                loss = loss + _backward(logits, part, targets, course.label_smoothing, process.device)
            average_gradients(parameters, len(images), process)
            optimizer.step()
            step += 1
            progress.show(step * inputs.batch, note)
        mean_loss = sum_over_ranks(loss, process) / (inputs.steps * inputs.batch)  # [G]
        if not bool(mean_loss.isfinite().any()):
            raise UserError(
                f"{progress.name} diverged in epoch {epoch + 1}: its loss is no number; take a lower learning rate"
            )
        note = f"loss {float(torch.where(mean_loss.isfinite(), mean_loss, torch.inf).min()):.3f}"
    progress.end(step * inputs.batch, note)
    return step * inputs.batch / (time.monotonic() - began)


@torch.no_grad()
def predict(logits: Logits, batches: Iterable[Tensor], *, num_classifiers: int, process: Process) -> Tensor:
    """Classes that each classifier predicts, [G, n] on the CPU; -1 where its logits are no numbers.

    The processes share the images as a stride deals them out (``samples[rank::world_size]``); all get all.
    """
    # Something to gather also where there are fewer images than processes.
    predictions = [torch.empty(0, num_classifiers, dtype=torch.int64)]
    for images in batches:
        with autocast(process.device):
            scores = logits(images.to(process.device, non_blocking=True)).float()  # [G, B, C]
        predictions.append(scores.argmax(dim=2).where(scores.isfinite().all(dim=2), -1).T.cpu())
    return gather_rows(torch.cat(predictions), process).T


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bf16 on a GPU; a CPU computes in float32, where bf16 would be slower on most."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _backward(logits: Logits, images: Tensor, labels: Tensor, smoothing: float, device: torch.device) -> Tensor:
    """Add the gradients of the summed loss; returns the loss summed over images [G]."""
    with autocast(device):
        scores = logits(images.to(device, non_blocking=True))
    targets = labels.to(device).expand(len(scores), -1)  # [G, b]
    loss = F.cross_entropy(
        scores.float().flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    ).view(targets.shape)
    loss.sum().backward()  # classifiers share no parameter that is trained: each gets the gradient of its own loss
    return loss.detach().sum(dim=1)
