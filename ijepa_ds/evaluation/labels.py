"""From raw labels to classes 0 to C - 1: integers as they are, continuous ones cut into bins.

Shapes: n training, m validation images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.errors import UserError, some

CLEVR_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # VTAB's bins of Clevr/Dist: up to 8, 8.5, 9, 9.5, 10, 100
NUM_BINS = 6
KEPT_CLASSES = 100  # of more, neither names nor a confusion matrix are kept


@dataclass(frozen=True)
class Classes:
    """Class labels of both splits, int64 from 0, and what each class is called."""

    train: Tensor  # [n]
    validation: Tensor  # [m]
    names: list[str]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.names)

    def confusion(self, predictions: Tensor) -> list[list[int]] | None:
        """Images of each true class (rows) by the class in ``predictions`` [m]; None where there are too many."""
        count = self.num_classes
        if count > KEPT_CLASSES:
            return None
        pairs = self.validation * count + predictions.cpu()
        return torch.bincount(pairs, minlength=count * count).view(count, count).tolist()

    def accuracy(self, predictions: Tensor) -> float:
        """Percent of validation that ``predictions`` [m] have right."""
        return 100.0 * int((predictions.cpu() == self.validation).sum()) / len(self.validation)


def classes_of(field: str, train: Tensor, validation: Tensor, names: list[str] | None = None) -> Classes:
    """Number the classes that train [n] shows: 3 to 10 objects are classes 0 to 7.

    ``names`` are those of the raw labels from 0, where known.

    Raises:
        UserError: a class is in validation and not in train (named), or there is one class only.
    """
    labels = train.unique()

    def name(label: int) -> str:
        return names[label] if names and 0 <= label < len(names) else str(label)

    if missing := sorted(set(validation.tolist()) - set(labels.tolist())):
        raise UserError(
            f"the validation images have {len(missing)} classes of '{field}' of which no training image is used: "
            f"{some(map(name, missing))}; convert both from the same classes, or raise --train-images"
        )
    if len(labels) < 2:
        raise UserError(f"all training images have '{field}' = {name(int(labels[0]))}: there is nothing to tell apart")
    train, validation = (torch.searchsorted(labels, part) for part in (train, validation))
    return Classes(train, validation, [name(int(label)) for label in labels])


def binned(field: str, train: Tensor, validation: Tensor, *, edges: Sequence[float] | None = None) -> Classes:
    """Cut continuous labels at ``edges`` (default: six bins of equal population in train).

    A value on an edge goes to the lower bin.

    Raises:
        UserError: a bin that no training image falls into.
    """
    bounds = bin_edges(train) if edges is None else torch.tensor(edges, dtype=torch.float64)
    inner = [f"{edge:.4g}" for edge in bounds.tolist()]
    ends = zip(["", *inner], [*inner, ""], strict=True)
    names = [f"{low}-{high}" if low and high else f"<= {high}" if high else f"> {low}" for low, high in ends]
    bins = [torch.bucketize(values.double(), bounds) for values in (train, validation)]
    empty = (torch.bincount(bins[0], minlength=len(names)) == 0).nonzero().flatten().tolist()
    if empty and edges is not None:
        raise UserError(
            f"no training image has a '{field}' of {', '.join(names[k] for k in empty)}: these bins are CLEVR's; take "
            "bins of equal population with --bins equal"
        )
    if empty:
        raise UserError(
            f"the {len(train)} training images have {len(train.unique())} different values of '{field}', which do not "
            f"fill {NUM_BINS} bins: raise --train-images, or choose another --label"
        )
    return Classes(bins[0], bins[1], names)


def bin_edges(values: Tensor) -> Tensor:
    """The inner edges, float64, that cut ``values`` [n] of train into six bins of about equal size."""
    shares = np.arange(1, NUM_BINS) / NUM_BINS
    return torch.from_numpy(np.quantile(values.double().numpy(), shares))  # torch's refuses more than 16 million
