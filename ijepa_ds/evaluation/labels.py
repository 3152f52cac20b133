"""From raw labels to classes 0 to C - 1: integers as they are, continuous ones cut into bins.

Shapes: n training, m validation images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.standardise import _check_values

CLEVR_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # VTAB's bins of Clevr/Dist: up to 8, 8.5, 9, 9.5, 10, 100
NUM_BINS = 6


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


def classes_of(field: str, train: Tensor, validation: Tensor, names: list[str] | None = None) -> Classes:
    """Number the classes that train shows: 3 to 10 objects are classes 0 to 7.

    Args:
        field: for the message.
        train: raw integer labels [n].
        validation: [m].
        names: of the raw labels from 0, where known.

    Raises:
        UserError: a class is in validation and not in train (named), or there is one class only.
    """
    found = train.unique()

    def name(label: int) -> str:
        return names[label] if names and 0 <= label < len(names) else str(label)

    missing = sorted(set(validation.unique().tolist()) - set(found.tolist()))
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UserError(
            f"the validation images have {len(missing)} classes of '{field}' of which no training image is used: "
            f"{', '.join(map(name, missing[:8]))}{more}; convert both from the same classes, or raise --train-images"
        )
    if len(found) < 2:
        raise UserError(f"all training images have '{field}' = {name(int(found[0]))}: there is nothing to tell apart")
    return Classes(
        torch.searchsorted(found, train), torch.searchsorted(found, validation), [name(int(label)) for label in found]
    )


def binned(field: str, train: Tensor, validation: Tensor, *, edges: Tensor | None = None) -> Classes:
    """Cut continuous labels at ``edges`` (default: six bins of equal population in train).

    Raises:
        UserError: labels that are not finite, or a bin that no training image falls into.
    """
    if edges is None:
        edges = bin_edges(train, NUM_BINS)
    inner = [f"{float(edge):.4g}" for edge in edges]
    bounds = zip(["", *inner], [*inner, ""], strict=True)
    names = [f"{low}-{high}" if low and high else f"<= {high}" if high else f"> {low}" for low, high in bounds]
    bins = [to_bins(values, edges) for values in (train, validation)]
    empty = (torch.bincount(bins[0], minlength=len(names)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"no training image has a '{field}' of {', '.join(names[k] for k in empty)}: these bins are CLEVR's; take "
            "bins of equal population with --bins equal"
        )
    return Classes(*bins, names)


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


CONFUSION_CLASSES = 100  # a larger matrix is not kept


def confusion_matrix(classes: Classes, predictions: Tensor) -> list[list[int]] | None:
    """Images of each true class (rows) by the class they were given; None where there are too many classes."""
    count = classes.num_classes
    if count > CONFUSION_CLASSES:
        return None
    pairs = classes.validation.cpu() * count + predictions.cpu()
    return torch.bincount(pairs, minlength=count * count).view(count, count).tolist()
