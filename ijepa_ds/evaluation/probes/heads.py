"""Many linear classifiers on the same features, trained together: one large product for all heads of a kind.

A head is a linear layer, or BatchNorm and a linear layer. BatchNorm's statistics depend on its input alone, so all
heads share them; its scale and shift, which each head has for itself, fold into the head's matrix:
W (gamma * x + beta) + b = (W * gamma) x + (W beta + b). The gradients are written out, which saves autograd's copies.

What is learnt depends neither on the micro-batch nor on the number of processes: batches are functions of the seed and
the epoch, and BatchNorm sees whole batches.

Shapes: n rows (B of a step on this process, m of validation), D features of all F, H heads of a stack, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.distributed import Process, sum_over_ranks
from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.probes.head_optimizers import lars_step, sgd_step
from ijepa_ds.evaluation.probes.recipes import Head, Recipe
from ijepa_ds.progress import Progress

BN_EPS, BN_MOMENTUM = 1e-5, 0.1  # torch's
INIT_STD = 0.01
CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32
PREDICT_ROWS = 4096
STEPS = {"lars": lars_step, "sgd": sgd_step}


class HeadStack:
    """The heads that share an input: the same columns, all with BatchNorm or all without."""

    def __init__(self, heads: list[Head], width: int, inputs: Inputs) -> None:
        self.heads, self.num_classes, device = heads, inputs.num_classes, inputs.process.device
        self.normed = heads[0].norm == "bn"
        count = len(heads)
        start = INIT_STD * torch.randn(self.num_classes, width, generator=torch.Generator().manual_seed(inputs.seed))
        self.weight = start.to(device).expand(count, -1, -1).clone()  # [H, C, D]: all heads start alike
        self.bias = torch.zeros(count, self.num_classes, device=device)
        self.gamma, self.beta = torch.ones(count, width, device=device), torch.zeros(count, width, device=device)
        self.lr = torch.tensor([head.lr for head in heads], device=device)
        self.weight_decay = torch.tensor([head.weight_decay for head in heads], device=device)
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, each [H, ...]; the matrices first."""
        return [self.weight, self.bias] + ([self.gamma, self.beta] if self.normed else [])

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [H * C, D] and bias [H * C] of the one product."""
        weight, bias = self.weight, self.bias
        if self.normed:
            bias = bias + torch.einsum("hcd,hd->hc", weight, self.beta)
            weight = weight * self.gamma[:, None, :]
        return weight.flatten(0, 1), bias.flatten()

    def gradients(self, rows: Tensor, labels: Tensor, *, total: int) -> tuple[list[Tensor], Tensor]:
        """Gradients of the mean cross-entropy with respect to :attr:`parameters`, and this loss [H].

        The mean is over the ``total`` rows of all processes, of which ``rows`` [n, D] (normalised where the heads have
        BatchNorm) and ``labels`` [n] are this one's.
        """
        weight, bias = self.folded()
        count = len(self.heads)
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        loss = torch.zeros(count, device=rows.device)
        chunk = max(1, CHUNK_ELEMENTS // len(bias))
        for part, part_labels in zip(rows.split(chunk), labels.split(chunk), strict=True):
            logits = torch.addmm(bias, part, weight.T).view(len(part), count, self.num_classes)
            picked = part_labels[:, None, None].expand(-1, count, 1)
            log_sum = logits.logsumexp(dim=2, keepdim=True)
            loss += (log_sum - logits.gather(2, picked)).sum(dim=(0, 2))
            wrong = logits.sub_(log_sum).exp_()  # the probabilities, less 1 at the label, is the gradient
            wrong.scatter_add_(2, picked, wrong.new_full((), -1.0).expand(picked.shape))
            flat = wrong.view(len(part), -1)
            weight_gradient.addmm_(flat.T, part, alpha=1 / total)
            bias_gradient.add_(flat.sum(dim=0), alpha=1 / total)
        return self._unfolded(weight_gradient.view_as(self.weight), bias_gradient.view_as(self.bias)), loss / total

    def _unfolded(self, weight_gradient: Tensor, bias_gradient: Tensor) -> list[Tensor]:
        if not self.normed:
            return [weight_gradient, bias_gradient]
        gamma = (weight_gradient * self.weight).sum(dim=1)
        beta = torch.einsum("hc,hcd->hd", bias_gradient, self.weight)
        weight = weight_gradient.mul_(self.gamma[:, None, :])
        weight.add_(bias_gradient[:, :, None] * self.beta[:, None, :])
        return [weight, bias_gradient, gamma, beta]

    def predict(self, rows: Tensor) -> Tensor:
        """The class that each head gives each row: [n, H]."""
        weight, bias = self.folded()
        chunk = max(1, CHUNK_ELEMENTS // len(bias))
        logits = (torch.addmm(bias, part, weight.T) for part in rows.split(chunk))
        return torch.cat([part.view(-1, len(self.heads), self.num_classes).argmax(dim=2) for part in logits])


class SharedBatchNorm:
    """What all BatchNorms of the grid have in common: the statistics of each feature, [D].

    A batch's are those of all its rows on all processes, so that neither their number nor the micro-batch matters.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.mean, self.variance = torch.zeros(width, device=device), torch.ones(width, device=device)

    def normalise_batch(self, rows: Tensor, *, total: int, process: Process) -> Tensor:
        """This process's rows [n, D] of a batch of ``total``, by the batch's statistics; the running ones are moved."""
        mean = sum_over_ranks(rows.sum(dim=0), process) / total
        # A second pass: the difference of two large sums would lose what a feature far from 0 varies by.
        variance = sum_over_ranks((rows - mean).square().sum(dim=0), process) / total
        self.mean.lerp_(mean, BN_MOMENTUM)
        self.variance.lerp_(variance * (total / max(1, total - 1)), BN_MOMENTUM)  # unbiased, as torch keeps it
        return (rows - mean) * (variance + BN_EPS).rsqrt()

    def normalise(self, rows: Tensor) -> Tensor:
        """Rows [n, D] by the running statistics, for the test."""
        return (rows - self.mean) * (self.variance + BN_EPS).rsqrt()


class HeadGrid:
    """All heads of a grid over the columns ``views`` of one feature matrix [n, D]."""

    def __init__(
        self, heads: list[Head], views: dict[str, slice], width: int, inputs: Inputs, *, optimizer: str
    ) -> None:
        self.views, self.process = views, inputs.process
        self.step_optimizer = STEPS[optimizer]
        kinds: dict[tuple[str, str], list[Head]] = {}
        for head in heads:
            kinds.setdefault((head.features, head.norm), []).append(head)
        self.stacks = [
            HeadStack(kind, len(range(width)[views[features]]), inputs) for (features, _), kind in kinds.items()
        ]
        self._batch_norm = SharedBatchNorm(width, self.process.device)

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, *, total: int, lr_factor: float) -> Tensor:
        """One optimizer step on this process's rows [n, D] and labels [n] of a batch of ``total``.

        The loss before it, [H], comes back in the order of :attr:`order`.
        """
        normed = self._batch_norm.normalise_batch(rows, total=total, process=self.process)
        losses = []
        for stack in self.stacks:
            gradients, loss = stack.gradients(self._columns(stack, rows, normed), labels, total=total)
            *gradients, loss = (sum_over_ranks(part, self.process) for part in (*gradients, loss))
            losses.append(loss)
            self.step_optimizer(
                stack.parameters, gradients, stack.momenta, lr=stack.lr * lr_factor, weight_decay=stack.weight_decay
            )
        return torch.cat(losses)

    @torch.no_grad()
    def predict(self, batches: Iterable[Tensor]) -> Tensor:
        """The class that each head gives each of all rows, int64 [n, H] on the CPU, heads as in :attr:`order`."""
        predictions = []
        for rows in batches:
            rows = rows.to(self.process.device)
            normed = self._batch_norm.normalise(rows)
            parts = [stack.predict(self._columns(stack, rows, normed)) for stack in self.stacks]
            predictions.append(torch.cat(parts, dim=1).cpu())
        return torch.cat(predictions)

    def _columns(self, stack: HeadStack, rows: Tensor, normed: Tensor) -> Tensor:
        """What a stack sees of the rows, as they are or normalised."""
        return (normed if stack.normed else rows)[:, self.views[stack.heads[0].features]]

    @property
    def order(self) -> list[Head]:
        """The heads, stack by stack."""
        return [head for stack in self.stacks for head in stack.heads]


def train_heads(
    inputs: Inputs, validation: Tensor, views: dict[str, slice], recipe: Recipe, progress: Progress
) -> tuple[list[dict[str, Any]], list[Tensor], float]:
    """Train all heads of ``recipe`` on features [B, F] and measure them on those of ``validation`` [m, F] at the end.

    Each of ``views``, columns of the features, has heads of its own. All processes call this together.

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
