"""Linear probes on cached features: logistic regression for classes, ridge regression for a continuous label.

Fast and without a schedule to tune, for watching a run and for small data sets; the paper's linear protocol is another
one. Features are standardised on train. The one free number, the strength l2 of the penalty, is chosen on a held-out
part of train (val is never looked at), then the probe is fitted again on all of train.

Shapes: n rows (one an image), D features, C classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.input_checks import check_every_class, check_features, check_labels, check_splits
from ijepa_ds.evaluation.probes.standardise import (
    _checked,
    _percent_correct,
    _standardise,
    _Standardised,
    stratified_split,
)

LOGISTIC_L2 = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each fit starts from the one before
MAX_ITERATIONS = 100  # about 20 are taken
GRADIENT_TOLERANCE = 1e-5  # largest entry, in the whitened basis


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier: ``logits = features @ weight.T + bias`` (standardisation folded in)."""

    accuracy: float  # percent of val
    train_accuracy: float  # percent of train, the same fit
    l2: float  # the strength chosen
    held_out_loss: dict[float, float]  # cross-entropy on the held-out part of train, by strength
    predictions: Tensor  # [n of val], int64
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]


@torch.inference_mode(False)  # it needs gradients wherever it is called from
@torch.enable_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int,
    seed: int,
    strengths: Sequence[float] = LOGISTIC_L2,
) -> LinearProbe:
    """Multinomial logistic regression: mean cross-entropy + l2 / 2 * |weight|^2, full batch L-BFGS in float32.

    In scikit-learn's terms C = 1 / (l2 * n).

    Args:
        train_features: [n, D], any float dtype; the work is done on its device.
        train_labels: [n], integers from 0.
        val_features: [m, D].
        val_labels: [m].
        num_classes: C.
        seed: of the held-out part of train.
        strengths: values of l2 to choose from.

    Raises:
        UserError: rows that are not finite, lengths that do not match, a class without images, or only in val.
    """
    train_features, train_labels, val_features, val_labels = _checked(
        train_features, train_labels, val_features, val_labels
    )
    check_labels(train_labels, val_labels, num_classes=num_classes)
    check_every_class(train_labels, num_classes=num_classes)
    train_labels, val_labels = train_labels.long(), val_labels.long()
    strengths = sorted(strengths, reverse=True)

    held_out = stratified_split(train_labels, seed=seed)
    fitted_part, fitted_labels = _standardise(train_features[~held_out]), train_labels[~held_out]
    held_out_rows, held_out_loss, fit = fitted_part.apply(train_features[held_out]), {}, None
    for l2 in strengths:
        fit = _fit_logistic(fitted_part, fitted_labels, fit, num_classes=num_classes, l2=l2)
        # Not the accuracy: on few images it picks among strengths by luck.
        held_out_loss[l2] = float(F.cross_entropy(F.linear(held_out_rows, *fit), train_labels[held_out]))
    best_l2 = min(strengths, key=lambda l2: held_out_loss[l2])

    train = _standardise(train_features)
    weight, bias = _fit_logistic(train, train_labels, None, num_classes=num_classes, l2=best_l2)
    predictions = _classify(train.apply(val_features), weight, bias)
    return LinearProbe(
        accuracy=_percent_correct(predictions, val_labels),
        train_accuracy=_percent_correct(_classify(train.rows, weight, bias), train_labels),
        l2=best_l2,
        held_out_loss=held_out_loss,
        predictions=predictions,
        weight=weight / train.std,
        bias=bias - weight @ (train.mean / train.std),
    )


@torch.inference_mode(False)
@torch.enable_grad()
def logistic_path(
    features: Tensor, labels: Tensor, *, num_classes: int, strengths: Sequence[float]
) -> dict[float, tuple[Tensor, Tensor]]:
    """The regression of :func:`linear_probe` for each strength: weight [C, D] and bias [C], for raw features.

    ``features`` float32 [n, D] and ``labels`` int64 [n] as that function checks them; a class may be missing.
    """
    train, fit, fits = _standardise(features), None, {}
    for l2 in sorted(strengths, reverse=True):
        fit = _fit_logistic(train, labels, fit, num_classes=num_classes, l2=l2)
        fits[l2] = (fit[0] / train.std, fit[1] - fit[0] @ (train.mean / train.std))
    return fits


def _fit_logistic(
    train: _Standardised, labels: Tensor, start: tuple[Tensor, Tensor] | None, *, num_classes: int, l2: float
) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] (not penalised) for standardised rows."""
    # Features of a network are strongly correlated, which makes plain L-BFGS take hundreds of iterations. The Hessian
    # is bounded by Gram / 2 + l2 (Boehning 1992, Ann. Inst. Stat. Math. 44), so the search runs in a basis where that
    # bound is the identity: weight = (whitened * scale) @ basis.T.
    scale = (train.variances.clamp_min(0) / 2 + l2).rsqrt()  # [D]
    if start is None:
        whitened, bias = train.rows.new_zeros(num_classes, len(scale)), train.rows.new_zeros(num_classes)
    else:
        whitened, bias = start[0] @ train.basis / scale, start[1].clone()
    whitened.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [whitened, bias], max_iter=MAX_ITERATIONS, tolerance_grad=GRADIENT_TOLERANCE, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = (whitened * scale) @ train.basis.T
        loss = F.cross_entropy(F.linear(train.rows, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((whitened * scale) @ train.basis.T).detach(), bias.detach()


def _classify(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(rows, weight, bias).argmax(dim=1)


NUM_FOLDS = 5


# Where every class has one image, so that nothing can be held out to choose by. It hardly matters: on scikit-learn's
# digits (8 draws, pixels and random features) 1 to 1e-3 are within 0.3 points of each other.
FIXED_L2 = 1e-1


@dataclass(frozen=True)
class LowShot:
    """Accuracies in percent of the validation images, one a draw."""

    accuracies: list[float]
    l2: list[float]  # the strength that each draw chose
    predictions: Tensor  # [n of validation], int64, of the first draw
    images: list[int]  # how many labelled images each draw had

    @property
    def mean(self) -> float:
        """Over the draws."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the draws; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@torch.inference_mode(False)  # the fits need gradients wherever it is called from
def low_shot(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    subsets: Sequence[np.ndarray | Tensor],
    num_classes: int,
    strengths: Sequence[float] = LOGISTIC_L2,
) -> LowShot:
    """Logistic regression on each subset of train, measured on all of validation.

    The strength is chosen anew for each subset, by cross-entropy under 5-fold cross-validation within the subset:
    held out once, the 15 % of :func:`linear_probe` would be 2 of 13 images a class, a
    choice by luck. With one image a class it is :data:`FIXED_L2`.

    Args:
        train_features: [n, D], any float dtype; the work is done on its device.
        train_labels: [n], integers from 0.
        val_features: [m, D].
        val_labels: [m].
        subsets: sample numbers into train, one array a draw.
        num_classes: C.
        strengths: values of l2 to choose from.

    Raises:
        UserError: rows that are not finite, lengths that do not match, a class without images in a subset.
    """
    if not subsets:
        raise UserError("there is no draw to measure: ask for at least 1")
    check_features("train", train_features, train_labels)
    check_features("val", val_features, val_labels)
    check_splits(train_features, val_features)
    device = train_features.device
    val_features, val_labels = val_features.detach().to(device).float(), val_labels.to(device)
    accuracies, chosen, predictions = [], [], []
    for subset in subsets:
        rows = torch.as_tensor(subset, device=device)
        features, labels = train_features[rows].detach().float(), train_labels.to(device)[rows]
        check_labels(labels, val_labels, num_classes=num_classes)
        check_every_class(labels, num_classes=num_classes)
        l2 = choose_strength(features, labels.long(), num_classes=num_classes, strengths=strengths)
        weight, bias = logistic_path(features, labels.long(), num_classes=num_classes, strengths=[l2])[l2]
        predictions.append(F.linear(val_features, weight, bias).argmax(dim=1))
        accuracies.append(100.0 * int((predictions[-1] == val_labels).sum()) / len(val_labels))
        chosen.append(l2)
    return LowShot(accuracies, chosen, predictions[0], [len(subset) for subset in subsets])


def choose_strength(features: Tensor, labels: Tensor, *, num_classes: int, strengths: Sequence[float]) -> float:
    """The l2 of least cross-entropy over all held-out images of the folds; :data:`FIXED_L2` where none can be."""
    if len(strengths) == 1:
        return strengths[0]
    fold = _deal_folds(labels)  # [n]
    if bool((fold < 0).all()):
        return FIXED_L2
    loss = dict.fromkeys(strengths, 0.0)
    for k in fold[fold >= 0].unique().tolist():
        held_out = fold == k
        fits = logistic_path(features[~held_out], labels[~held_out], num_classes=num_classes, strengths=strengths)
        for l2, (weight, bias) in fits.items():
            logits = F.linear(features[held_out], weight, bias)
            loss[l2] += float(F.cross_entropy(logits, labels[held_out], reduction="sum"))
    return min(strengths, key=lambda l2: loss[l2])


def _deal_folds(labels: Tensor) -> Tensor:
    """The fold of each of ``labels`` [n], dealt in turn within a class; -1 (never held out) for a class's only image.

    The samples of a subset ascend, and nothing in their order depends on the image: no seed is needed.
    """
    counts = torch.bincount(labels)
    by_class = labels.sort(stable=True).indices
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[by_class]]
    fold = torch.empty_like(labels)
    fold[by_class] = torch.where(counts[labels[by_class]] > 1, rank % NUM_FOLDS, -1)
    return fold
