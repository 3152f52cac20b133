"""From raw labels to classes 0 to C - 1: integers as they are, continuous ones cut into bins.

Shapes: n training, m validation images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.linear import bin_edges, to_bins

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
