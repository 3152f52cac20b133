"""Supervised training of one or several heads over batches that the caller makes, and their predictions.

The gradients of several processes are summed and divided by the images of all, so any number of processes and any
micro-batch take the same steps, up to summation order.

Shapes: B images that this process contributes to a step, G heads, C classes, n images measured.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.distributed import Process, average_gradients, gather_rows
from ijepa_ds.errors import UserError
from ijepa_ds.method.schedules import Schedules

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # epoch -> (inputs [B, ...], labels [B]), one a step
Logits = Callable[[Tensor], Tensor]  # inputs [b, ...] -> logits [G, b, C]
SECONDS_BETWEEN_LINES = 10.0


def fit(
    logits: Logits,
    optimizer: torch.optim.Optimizer,
    *,
    batches: Batches,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float,
    micro_batch: int,
    num_classes: int,
    num_heads: int,
    label_smoothing: float,
    process: Process,
    name: str,
    say: Callable[[str], None],
    after_epoch: Callable[[int], None],
) -> float:
    """Train with a linear warm-up and a cosine to zero; each parameter group brings its own ``peak_lr``.

    Args:
        logits: under bf16 autocast on a GPU, float32 on a CPU.
        batches: gives this process's share of each step. A process that has no more takes part without images.
        steps_per_epoch: optimizer steps, the same on every process.
        micro_batch: images that are computed at once; their gradients add up.
        say: takes a line of progress every few seconds, on the main process.
        after_epoch: called with the number of epochs done.

    Returns:
        Images per second of all processes, training only; NaN for a single step.

    Raises:
        UserError: a count below 1, labels outside of the classes, or every head's loss is NaN or infinite.
        ValueError: ``batches`` gave more or fewer steps than ``steps_per_epoch``.
    """
    for what, value in (("epochs", epochs), ("steps an epoch", steps_per_epoch), ("images at once", micro_batch)):
        if value < 1:
            raise UserError(f"{name} with {value} {what} trains nothing: give at least 1")
    total_steps = epochs * steps_per_epoch
    # One step longer than the run, so that the last step still moves.
    factor = Schedules(int(warmup_epochs * steps_per_epoch), total_steps + 1, 0.0, 1.0, 0.0, (0.0, 0.0), (0.0, 0.0))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    step, progress = 0, _Progress(name, total_steps, epochs, say if process.is_main else lambda _: None)
    for epoch in range(epochs):
        loss, num_images = torch.zeros(num_heads, device=process.device), 0
        for inputs, labels in _steps(batches(epoch), steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor.at(step).lr
            optimizer.zero_grad(set_to_none=True)
            if inputs is not None:
                _check_labels(labels, num_classes)
                for part, part_labels in zip(inputs.split(micro_batch), labels.split(micro_batch), strict=True):
                    loss += _backward(logits, part, part_labels, label_smoothing, process.device)
            count = average_gradients(parameters, 0 if inputs is None else len(inputs), process)
            if count == 0:
                raise ValueError(f"epoch {epoch} gave no images for step {step}: are there {steps_per_epoch} an epoch?")
            optimizer.step()
            step, num_images = step + 1, num_images + count
            progress.note(step, count)
        mean_loss = _sum_over_ranks(loss, process) / num_images  # [G]: the epoch's only wait for the device
        if not bool(torch.isfinite(mean_loss).any()):
            raise UserError(f"{name} diverged in epoch {epoch + 1}: its loss is no number; take a lower learning rate")
        best = float(mean_loss[torch.isfinite(mean_loss)].min())
        progress.end_epoch(epoch + 1, step, best)
        with progress.paused():
            after_epoch(epoch + 1)
    return progress.rate()


@torch.no_grad()
def predict(
    logits: Logits, batches: Iterable[tuple[Tensor, Tensor]], *, num_classes: int, num_heads: int, process: Process
) -> tuple[Tensor, Tensor]:
    """Classes that each head predicts [G, n] (-1 where its logits are no numbers) and the labels [n], on the CPU.

    The processes share the images as a stride deals them out (``samples[rank::world_size]``); all get all.

    Raises:
        UserError: there are no images, or labels outside of the classes.
    """
    # Something to gather also where there are fewer images than processes.
    predictions = [torch.empty(0, num_heads, dtype=torch.int64)]
    found = [torch.empty(0, dtype=torch.int64)]
    for inputs, labels in batches:
        _check_labels(labels, num_classes)
        with autocast(process.device):
            scores = logits(inputs.to(process.device, non_blocking=True)).float()  # [G, B, C]
        classes = scores.argmax(dim=2).where(torch.isfinite(scores).all(dim=2), -1)
        predictions.append(classes.T.cpu())
        found.append(labels.long().cpu())
    every_label = gather_rows(torch.cat(found), process)
    if not len(every_label):
        raise UserError("there are no validation images to measure on: give a file that has some")
    return gather_rows(torch.cat(predictions), process).T, every_label


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
    loss.sum().backward()  # the heads share no parameter that is trained, so each gets the gradient of its own loss
    return loss.detach().sum(dim=1)


def _steps(
    batches: Iterable[tuple[Tensor, Tensor]], steps_per_epoch: int
) -> Iterator[tuple[Tensor, Tensor] | tuple[None, None]]:
    """Exactly ``steps_per_epoch`` items: nothing where this process has no more images."""
    iterator = iter(batches)
    for _ in range(steps_per_epoch):
        yield next(iterator, (None, None))
    if next(iterator, None) is not None:
        raise ValueError(f"an epoch gave more batches than its {steps_per_epoch} steps")


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if (
        labels.is_floating_point()
        or labels.ndim != 1
        or (len(labels) and not 0 <= labels.min() <= labels.max() < num_classes)
    ):
        raise UserError(
            f"labels of {labels.dtype} from {labels.min()} to {labels.max()} are not the {num_classes} classes "
            f"0 to {num_classes - 1}: number them so"
        )


def _sum_over_ranks(values: Tensor, process: Process) -> Tensor:
    values = values.float().cpu()
    if process.world_size > 1:
        dist.all_reduce(values, group=process.control)
    return values


class _Progress:
    """A line every few seconds: images per second, and the time that is left of training.

    The first step is not counted: it waits for the loader's compilation and the device's start.
    """

    def __init__(self, name: str, total_steps: int, epochs: int, say: Callable[[str], None]) -> None:
        self.name, self.total_steps, self.epochs, self.say = name, total_steps, epochs, say
        self._images, self._paused = 0, 0.0
        self._start: float | None = None
        self._last_line = time.monotonic()

    def rate(self) -> float:
        """Images per second of training, without the pauses; NaN where there was but one step."""
        return self._images / max(self._seconds(), 1e-9) if self._images else math.nan

    def note(self, step: int, num_images: int) -> None:
        """``step`` steps are done, the last with so many images of all processes."""
        if self._start is None:
            self._start = time.monotonic()
            return
        self._images += num_images
        if time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line(step, f"step {step}/{self.total_steps}")

    def end_epoch(self, epoch: int, step: int, loss: float) -> None:
        """``epoch`` epochs are done."""
        self._line(step, f"epoch {epoch}/{self.epochs}, loss {loss:.3f}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin

    def _seconds(self) -> float:
        return time.monotonic() - self._start - self._paused if self._start is not None else 0.0

    def _line(self, step: int, what: str) -> None:
        self._last_line = time.monotonic()
        if self._images:
            left = self._seconds() / (step - 1) * (self.total_steps - step)
            what += f", {self.rate():,.0f} images/s, {int(left // 60)}:{int(left % 60):02d} left to train"
        self.say(f"{self.name}: {what}")
