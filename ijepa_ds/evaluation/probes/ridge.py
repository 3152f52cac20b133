"""Ridge regression: a continuous label, or classes in one shot.

Shapes: n training, m validation rows (one an image), D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.evaluation.probes.standardise import Standardised, standardise

STRENGTHS = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class RidgeFit:
    """A linear prediction of standardised rows."""

    l2: float
    weight: Tensor  # [D]
    mean: Tensor  # of the training values, not penalised

    def predict(self, rows: Tensor) -> Tensor:
        """Rows [m, D], as :meth:`Standardised.apply` gives them -> [m]."""
        return rows @ self.weight + self.mean


def ridge_regression(
    train: Standardised, values: Tensor, rows: Tensor, *, strengths: Sequence[float] = STRENGTHS
) -> tuple[float, Tensor]:
    """What :func:`fit_ridge` chooses, and its predictions [m] of ``rows`` [m, D]."""
    fit = fit_ridge(train, values, strengths=strengths)
    return fit.l2, fit.predict(rows)


@torch.no_grad()
def fit_ridge(train: Standardised, values: Tensor, *, strengths: Sequence[float] = STRENGTHS) -> RidgeFit:
    """Linear regression in closed form: mean squared error + l2 * |weight|^2.

    In scikit-learn's terms alpha = l2 * n. The strength is that of least squared error on each training image when it
    is left out, which the eigendecomposition of all of them tells (Golub, Heath, Wahba 1979, Technometrics 21).

    Args:
        train: rows [n, D], best in float64.
        values: [n] of these, of the same type.
        strengths: values of l2 to choose from.
    """
    mean = values.mean()
    correlation = train.rows.T @ (values - mean) / len(values)  # [D]
    errors, weights = {}, {}
    for l2 in strengths:
        weights[l2] = correlation / (train.variances + l2)
        leverage = (train.rows.square() @ (1 / (train.variances + l2)) + 1) / len(values)  # [n], 1 of the mean
        left_out = (values - mean - train.rows @ weights[l2]) / (1 - leverage).clamp_min(1e-9)
        errors[l2] = float(left_out.square().mean())
    best = min(strengths, key=lambda l2: errors[l2])
    return RidgeFit(best, weights[best], mean)


@torch.no_grad()
def least_squares_predictions(features: Tensor, labels: Tensor, others: Tensor, *, l2: float = 1e-3) -> Tensor:
    """Classes [m] by a linear classifier fitted in one shot: ridge regression onto one-hot labels.

    Fitted on float32 features [n, D] and labels [n] from 0, for ``others`` [m, D]. Cheap enough to watch a run; what
    logistic regression gives is usually some points higher. ``l2`` as for :func:`ridge_regression`.
    """
    train = standardise(features)
    targets = F.one_hot(labels).to(train.rows.dtype)  # [n, C]
    weight = train.rows.T @ (targets - targets.mean(0)) / len(targets) / (train.variances + l2)[:, None]  # [D, C]
    return (train.apply(others) @ weight + targets.mean(0)).argmax(dim=1)
