"""Evaluation of frozen features: what every probe asks of its input.

Shapes: n rows (one an image), D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_ds.errors import UserError


def check_features(name: str, features: Tensor, targets: Tensor) -> None:
    """Refuse features that no probe can learn from.

    Args:
        name: which split this is, for the message ("train", "val").
        features: [n, D].
        targets: [n], labels or continuous values.

    Raises:
        UserError: no rows, a length that does not match, or NaN or infinity among the features.
    """
    if features.ndim != 2 or targets.ndim != 1 or len(features) != len(targets):
        raise UserError(
            f"the {name} features of shape {list(features.shape)} and the {name} labels of shape {list(targets.shape)} "
            "do not match: give [n, D] and [n]"
        )
    if len(features) == 0:
        raise UserError(f"the {name} split has no images")
    num_bad = int((~torch.isfinite(features).all(dim=1)).sum())
    if num_bad:
        raise UserError(
            f"{num_bad} of {len(features)} rows of the {name} features hold NaN or infinity: "
            "the checkpoint has diverged or is damaged"
        )


def check_splits(train_features: Tensor, features: Tensor) -> None:
    """Raises:
    UserError: the two splits [n, D] differ in D.
    """
    if train_features.shape[1] != features.shape[1]:
        raise UserError(
            f"train features of width {train_features.shape[1]} and val features of width {features.shape[1]} "
            "do not match: take both from one encoder"
        )


def check_labels(train_labels: Tensor, labels: Tensor, *, num_classes: int) -> None:
    """Refuse class labels [n] that are no integers from 0 to ``num_classes - 1``, or that train does not show.

    Raises:
        UserError: with the offending labels.
    """
    for name, some in (("train", train_labels), ("val", labels)):
        if some.is_floating_point() or some.is_complex() or some.dtype == torch.bool:
            raise UserError(f"the {name} labels are {some.dtype}, not integers: see bin_edges for a continuous label")
        if some.min() < 0 or some.max() >= num_classes:
            raise UserError(
                f"the {name} labels reach from {int(some.min())} to {int(some.max())}, "
                f"but {num_classes} classes are numbered 0 to {num_classes - 1}"
            )
    only_val = sorted(set(labels.unique().tolist()) - set(train_labels.unique().tolist()))
    if only_val:
        raise UserError(f"{_name_classes(only_val)} in val but has no image in train")


def check_every_class(train_labels: Tensor, *, num_classes: int) -> None:
    """Raises:
    UserError: a class of ``num_classes`` has no image among ``train_labels`` [n].
    """
    empty = (torch.bincount(train_labels.long(), minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"{_name_classes(empty)} among the {num_classes} classes but has no image in train")


def _name_classes(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:8])) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    return f"class {shown} is" if len(classes) == 1 else f"each of the classes {shown} is"
