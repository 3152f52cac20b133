"""What every probe does to its input first: check it, standardise it, hold a part of it out.

Shapes: n rows (one an image), D features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.input_checks import check_features, check_splits

HELD_OUT_SHARE = 0.15


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


def _percent_correct(predictions: Tensor, labels: Tensor) -> float:
    return 100.0 * int((predictions == labels).sum()) / len(labels)
