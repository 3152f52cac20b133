"""Linear probes on cached features: logistic regression for classes, ridge regression for a continuous label.

Fast and without a schedule to tune, for watching a run and for small data sets; the paper's linear protocol is another
one. Features are standardised on train. The one free number, the strength l2 of the penalty, is chosen on a held-out
part of train (val is never looked at), then the probe is fitted again on all of train.

Shapes: n rows (one an image), D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation import check_every_class, check_features, check_labels, check_splits

LOGISTIC_L2 = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each fit starts from the one before
RIDGE_L2 = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
HELD_OUT_SHARE = 0.15
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


def bin_edges(values: Tensor, num_bins: int) -> Tensor:
    """The ``num_bins - 1`` inner edges [float64] that cut ``values`` [n] (of train) into bins of about equal size.

    Raises:
        UserError: the values are not finite, or too few of them differ for every bin to have one.
    """
    _check_values("train", values)
    if num_bins < 2:
        raise UserError(f"{num_bins} bins leave nothing to tell apart: take at least 2")
    ordered = values.double().sort().values  # torch.quantile refuses more than 16 million
    position = torch.arange(1, num_bins, device=values.device, dtype=torch.float64) / num_bins * (len(values) - 1)
    below = position.floor().long()
    edges = torch.lerp(ordered[below], ordered[position.ceil().long()], position - below)
    if bool((torch.bincount(to_bins(values, edges), minlength=num_bins) == 0).any()):
        raise UserError(
            f"{len(values)} values with {len(values.unique())} different ones do not fill {num_bins} bins: take fewer"
        )
    return edges


def to_bins(values: Tensor, edges: Tensor) -> Tensor:
    """The bin of each of ``values`` [n], int64 from 0 to len(edges); a value on an edge goes to the lower bin."""
    return torch.bucketize(values.double(), edges.to(values.device, torch.float64))


def stratified_split(labels: Tensor, *, seed: int) -> Tensor:
    """A seeded part of each class to hold out: about 15 %, at least one image of a class that has two.

    Args:
        labels: [n] integers.

    Returns:
        bool [n], true where held out.

    Raises:
        UserError: no class has two images.
    """
    counts = torch.bincount(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = order[labels[order].sort(stable=True).indices]  # class by class, shuffled within each
    first_of_class = counts.cumsum(0) - counts
    rank = torch.arange(len(labels), device=labels.device) - first_of_class[labels[by_class]]
    num_held_out = (counts * HELD_OUT_SHARE).round().long().clamp_min(1).minimum((counts - 1).clamp_min(0))
    held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held_out[by_class] = rank < num_held_out[labels[by_class]]
    if not held_out.any():
        raise UserError("every class has a single training image: two are needed to choose the probe's strength")
    return held_out


@dataclass(frozen=True)
class _Standardised:
    rows: Tensor  # [n, D], mean 0 and standard deviation 1
    mean: Tensor  # [D]
    std: Tensor  # [D], 1 where a feature never changes
    variances: Tensor  # [D], eigenvalues of the Gram matrix rows.T @ rows / n
    basis: Tensor  # [D, D], its eigenvectors in columns

    def apply(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def _standardise(features: Tensor) -> _Standardised:
    std, mean = torch.std_mean(features, dim=0, correction=0)
    # Rounding noise on a feature that never changes must not be blown up to a signal.
    std = torch.where(std > 1e-6 * features.abs().amax(dim=0), std, 1.0)
    rows = (features - mean) / std
    variances, basis = torch.linalg.eigh(rows.T @ rows / len(rows))
    return _Standardised(rows, mean, std, variances, basis)


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


def _fit_ridge(features: Tensor, values: Tensor, strengths: Sequence[float]) -> dict[float, tuple[Tensor, Tensor]]:
    """Weight [D] and bias [] in float64 for each strength, from one eigendecomposition."""
    train, mean_value = _standardise(features.double()), values.mean()
    correlation = train.basis.T @ (train.rows.T @ (values - mean_value)) / len(values)  # [D], in the eigenbasis
    fits = {}
    for l2 in strengths:
        weight = train.basis @ (correlation / (train.variances.clamp_min(0) + l2)) / train.std
        fits[l2] = (weight, mean_value - weight @ train.mean)
    return fits


def _checked(
    train_features: Tensor, train_targets: Tensor, val_features: Tensor, val_targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors on one device, features in float32."""
    check_features("train", train_features, train_targets)
    check_features("val", val_features, val_targets)
    check_splits(train_features, val_features)
    device = train_features.device
    # Cloned: targets made in inference mode could not be kept for the backward pass.
    return (
        train_features.detach().float(),
        train_targets.to(device).clone(),
        val_features.detach().to(device).float(),
        val_targets.to(device).clone(),
    )


def _check_values(name: str, values: Tensor) -> None:
    num_bad = int((~torch.isfinite(values)).sum())
    if num_bad or len(values) == 0:
        raise UserError(f"{num_bad} of {len(values)} {name} values are NaN or infinite: every image needs a number")


def _classify(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(rows, weight, bias).argmax(dim=1)


def _percent_correct(predictions: Tensor, labels: Tensor) -> float:
    return 100.0 * int((predictions == labels).sum()) / len(labels)
