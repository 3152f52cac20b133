"""Features as every linear probe takes them, and which training images choose a probe's strength.

Shapes: n rows (one an image), D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_ds.errors import UserError

HELD_OUT_SHARE, NUM_FOLDS = 0.15, 5


@dataclass(frozen=True)
class Standardised:
    """Training rows of mean 0 and deviation 1, turned into the eigenvectors of their Gram matrix."""

    rows: Tensor  # [n, D]
    variances: Tensor  # [D], of the columns of ``rows``
    mean: Tensor  # [D], of the features
    turn: Tensor  # [D, D]

    def apply(self, features: Tensor) -> Tensor:
        """Other features [m, D] in the same way."""
        return (features - self.mean) @ self.turn


@torch.no_grad()
def standardise(features: Tensor) -> Standardised:
    """Standardise ``features`` [n, D]: one eigendecomposition, for every probe on them."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    # Rounding noise on a feature that never changes must not be blown up to a signal.
    std = torch.where(std > 1e-6 * features.abs().amax(dim=0), std, 1.0)
    rows = (features - mean) / std
    variances, basis = torch.linalg.eigh(rows.T @ rows / len(rows))
    return Standardised(rows @ basis, variances.clamp_min(0), mean, basis / std[:, None])


def held_out_part(labels: Tensor, *, seed: int) -> Tensor:
    """Choose about 15 % of each class to hold out, at least one image of a class that has two: bool [n].

    Raises:
        UserError: no class in ``labels`` [n] has two images.
    """
    counts = torch.bincount(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    number = ((counts * HELD_OUT_SHARE).round().long().clamp_min(1)).minimum((counts - 1).clamp_min(0))
    held_out = torch.empty(len(labels), dtype=torch.bool, device=labels.device)
    held_out[order] = rank_within_class(labels[order]) < number[labels[order]]
    if not held_out.any():
        raise UserError("every class has a single training image: two are needed to choose the probe's strength")
    return held_out


def folds(labels: Tensor) -> list[Tensor]:
    """Deal ``labels`` [n] out in turn within each class: bool [n] for each of five folds, true where held out.

    A class's only image is never held out; where all classes have one there are no folds. The samples of a subset
    ascend, and nothing in their order depends on the image: no seed is needed.
    """
    alone = torch.bincount(labels)[labels] == 1
    fold = torch.where(alone, -1, rank_within_class(labels) % NUM_FOLDS)
    return [fold == k for k in fold[fold >= 0].unique().tolist()]


def rank_within_class(labels: Tensor) -> Tensor:
    """How many of the labels [n] before each are equal to it, [n]."""
    counts = torch.bincount(labels)
    by_class = labels.sort(stable=True).indices
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[by_class]]
    return rank
