"""Ridge regression: a continuous label, or classes in one shot.

Shapes: n rows (one an image), D features, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.standardise import (
    _check_values,
    _checked,
    _percent_correct,
    _standardise,
    stratified_split,
)

RIDGE_L2 = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class RidgeRegression:
    """A fitted regression: ``values = features @ weight + bias`` (standardisation folded in)."""

    mean_absolute_error: float  # on val, in the label's unit
    r2: float  # on val: 1 is perfect, 0 as good as val's mean; NaN where val's values are all equal
    l2: float  # the strength chosen
    held_out_error: dict[float, float]  # mean squared error on the held-out part of train, by strength
    predictions: Tensor  # [n of val]
    weight: Tensor  # [D], float64
    bias: Tensor  # []


@torch.no_grad()
def ridge_regression(
    train_features: Tensor,
    train_values: Tensor,
    val_features: Tensor,
    val_values: Tensor,
    *,
    seed: int,
    strengths: Sequence[float] = RIDGE_L2,
) -> RidgeRegression:
    """Linear regression: mean squared error + l2 * |weight|^2, in closed form and float64.

    In scikit-learn's terms alpha = l2 * n.

    Args:
        train_features: [n, D], any float dtype; the work is done on its device.
        train_values: [n], any unit.
        val_features: [m, D].
        val_values: [m].
        seed: of the held-out part of train.
        strengths: values of l2 to choose from.

    Raises:
        UserError: rows or values that are not finite, lengths that do not match, fewer than two training images.
    """
    train_features, train_values, val_features, val_values = _checked(
        train_features, train_values.double(), val_features, val_values.double()
    )
    for name, values in (("train", train_values), ("val", val_values)):
        _check_values(name, values)
    if len(train_values) < 2:
        raise UserError("ridge regression needs at least two training images: one to fit, one to choose its strength")

    held_out = stratified_split(torch.zeros_like(train_values, dtype=torch.int64), seed=seed)
    fits = _fit_ridge(train_features[~held_out], train_values[~held_out], strengths)
    held_out_features, held_out_values = train_features[held_out].double(), train_values[held_out]
    held_out_error = {
        l2: float((held_out_features @ weight + bias - held_out_values).square().mean())
        for l2, (weight, bias) in fits.items()
    }
    best_l2 = min(strengths, key=lambda l2: held_out_error[l2])

    weight, bias = _fit_ridge(train_features, train_values, [best_l2])[best_l2]
    predictions = val_features.double() @ weight + bias
    residual = (predictions - val_values).square().sum()
    spread = (val_values - val_values.mean()).square().sum()
    return RidgeRegression(
        mean_absolute_error=float((predictions - val_values).abs().mean()),
        r2=float(1 - residual / spread) if spread > 0 else float("nan"),
        l2=best_l2,
        held_out_error=held_out_error,
        predictions=predictions,
        weight=weight,
        bias=bias,
    )


@torch.no_grad()
def least_squares_accuracy(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, *, l2: float = 1e-3
) -> float:
    """Accuracy in percent of a linear classifier fitted in one shot: ridge regression onto one-hot labels.

    Cheap enough to watch a run; what :func:`linear_probe` gives is usually some points higher.

    Args:
        train_features: [n, D], any float dtype; the work is done on its device.
        train_labels: [n], integers from 0.
        val_features: [m, D].
        val_labels: [m].
        l2: mean squared error + l2 * |weight|^2 on standardised features; in scikit-learn's terms alpha = l2 * n.

    Raises:
        UserError: rows that are not finite, lengths that do not match.
    """
    train_features, train_labels, val_features, val_labels = _checked(
        train_features, train_labels, val_features, val_labels
    )
    train = _standardise(train_features)
    targets = F.one_hot(train_labels.long()).to(train.rows.dtype)  # [n, C]
    correlation = train.basis.T @ (train.rows.T @ (targets - targets.mean(0))) / len(targets)  # [D, C], eigenbasis
    weight = train.basis @ (correlation / (train.variances.clamp_min(0) + l2)[:, None])
    return _percent_correct((train.apply(val_features) @ weight + targets.mean(0)).argmax(dim=1), val_labels)


def _fit_ridge(features: Tensor, values: Tensor, strengths: Sequence[float]) -> dict[float, tuple[Tensor, Tensor]]:
    """Weight [D] and bias [] in float64 for each strength, from one eigendecomposition."""
    train, mean_value = _standardise(features.double()), values.mean()
    correlation = train.basis.T @ (train.rows.T @ (values - mean_value)) / len(values)  # [D], in the eigenbasis
    fits = {}
    for l2 in strengths:
        weight = train.basis @ (correlation / (train.variances.clamp_min(0) + l2)) / train.std
        fits[l2] = (weight, mean_value - weight @ train.mean)
    return fits
