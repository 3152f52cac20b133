"""Multinomial logistic regression on features made once; the strength of its penalty is chosen within train.

Fast and without a schedule to tune, for watching a run and for small data sets; the paper's linear protocol is another
one. mean cross-entropy + l2 / 2 * |weight|^2, full batch, L-BFGS in float32; in scikit-learn's terms C = 1 / (l2 n).

Shapes: n rows (one an image), D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.evaluation.probes.standardise import Standardised

STRENGTHS = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each fit starts from the one before
# Where every class has one image, so that nothing can be held out to choose by. It hardly matters: on scikit-learn's
# digits (8 draws, pixels and random features) 1 to 1e-3 are within 0.3 points of each other.
FIXED_STRENGTH = 1e-1
MAX_ITERATIONS = 100  # about 20 are taken
GRADIENT_TOLERANCE = 1e-5  # largest entry, in the whitened basis


@dataclass(frozen=True)
class Fit:
    """A classifier of standardised rows: ``logits = rows @ weight.T + bias``."""

    l2: float
    weight: Tensor  # [C, D]
    bias: Tensor  # [C], not penalised

    def logits(self, rows: Tensor) -> Tensor:
        """Rows [m, D], as :meth:`Standardised.apply` gives them -> [m, C]."""
        return F.linear(rows, self.weight, self.bias)


@torch.inference_mode(False)  # it needs gradients wherever it is called from
@torch.enable_grad()
def logistic_regression(
    train: Standardised,
    labels: Tensor,
    *,
    held_out: Sequence[Tensor],
    strengths: Sequence[float] = STRENGTHS,
    tick: Callable[[], object] = lambda: None,
) -> Fit:
    """Fit on all of train, with the strength of least cross-entropy on what was held out.

    Args:
        train: float32 rows [n, D].
        labels: [n], integers from 0 to C - 1; each class has an image.
        held_out: bool [n] each: one part, or several folds; with none the strength is :data:`FIXED_STRENGTH`.
        strengths: values of l2, strong to weak. Where a weaker one is worse, none that is weaker still is tried.
        tick: called in every iteration.
    """
    # Cloned: what was made in inference mode could not be kept for the backward pass.
    train, labels = replace(train, rows=train.rows.clone()), labels.clone()
    fits: list[Fit | None] = [None] * len(held_out)
    best, best_loss, start = FIXED_STRENGTH, math.inf, None
    for l2 in strengths if held_out else ():
        loss = 0.0
        for k, part in enumerate(held_out):
            fits[k] = fit = _fit(replace(train, rows=train.rows[~part]), labels[~part], l2, fits[k], tick)
            # Not the accuracy: on few images it picks among strengths by luck.
            loss += float(F.cross_entropy(fit.logits(train.rows[part]), labels[part], reduction="sum"))
        if loss >= best_loss:
            break
        best, best_loss, start = l2, loss, fits[0]
    return _fit(train, labels, best, start, tick)


def _fit(train: Standardised, labels: Tensor, l2: float, start: Fit | None, tick: Callable[[], object]) -> Fit:
    # Features of a network are strongly correlated, which makes plain L-BFGS take hundreds of iterations. The Hessian
    # is bounded by Gram / 2 + l2 (Boehning 1992, Ann. Inst. Stat. Math. 44), so the search runs on whitened weights,
    # for which that bound is the identity.
    scale = (train.variances / 2 + l2).rsqrt()  # [D]
    if start is None:
        num_classes = int(labels.max()) + 1
        start = Fit(l2, train.rows.new_zeros(num_classes, len(scale)), train.rows.new_zeros(num_classes))
    whitened, bias = (start.weight / scale).requires_grad_(), start.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [whitened, bias], max_iter=MAX_ITERATIONS, tolerance_grad=GRADIENT_TOLERANCE, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = whitened * scale
        loss = F.cross_entropy(F.linear(train.rows, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        tick()
        return loss

    optimizer.step(closure)
    return Fit(l2, (whitened * scale).detach(), bias.detach())
