"""Weighted nearest-neighbour classifier on frozen features: no training, so it can watch a run.

Shapes: n rows of the bank, q queries, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.evaluation.probes.input_checks import check_features, check_labels, check_splits

CHUNK_ELEMENTS = 2**25  # similarities held at once: 128 MiB in float32


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    ks: Iterable[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[int, float]:
    """Accuracy of the vote of the k nearest rows of the bank, each weighted by exp(cosine / temperature).

    The protocol of instance discrimination (arXiv 1805.01978, section 3.4), as DINO and others report it.

    Args:
        train_features: the bank [n, D], any float dtype; the work is done in float32 on its device.
        train_labels: [n], integers from 0.
        features: queries [q, D].
        labels: [q].
        ks: numbers of neighbours. One above n becomes n, which ``say`` is told.
        temperature: of the weights; smaller listens more to the nearest.
        num_classes: default: the largest label in train, plus one.
        say: takes one line of text.

    Returns:
        Top-1 accuracy in percent for each number of neighbours used, ascending.

    Raises:
        UserError: rows that are not finite, lengths that do not match, a class only in ``labels``.
    """
    check_features("train", train_features, train_labels)
    check_features("val", features, labels)
    check_splits(train_features, features)
    num_classes = num_classes or int(max(train_labels.max(), labels.max())) + 1
    check_labels(train_labels, labels, num_classes=num_classes)
    used_ks = _clip(ks, bank_size=len(train_features), say=say)

    device = train_features.device
    bank = F.normalize(train_features.float(), dim=1)  # [n, D]
    bank_labels = train_labels.to(device, torch.int64)
    correct = dict.fromkeys(used_ks, 0)
    rows = max(1, CHUNK_ELEMENTS // max(len(bank), num_classes * len(used_ks)))
    for chunk, chunk_labels in zip(features.split(rows), labels.split(rows), strict=True):
        queries = F.normalize(chunk.to(device).float(), dim=1)
        cosine, index = (queries @ bank.T).topk(used_ks[-1], dim=1)  # [q, k], nearest first
        # Relative to the nearest: the same vote, and no overflow at a small temperature.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        neighbour_labels, chunk_labels = bank_labels[index], chunk_labels.to(device)
        for k in used_ks:
            votes = torch.zeros(len(queries), num_classes, device=device)
            votes.scatter_add_(1, neighbour_labels[:, :k], weights[:, :k])
            correct[k] += int((votes.argmax(dim=1) == chunk_labels).sum())
    return {k: 100.0 * correct[k] / len(labels) for k in used_ks}


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, *, k: int) -> Tensor:
    """Rows of ``bank`` [n, D] nearest to each of ``queries`` [q, D] by cosine, nearest first: int64 [q, k]."""
    cosine = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
    return cosine.topk(min(k, len(bank)), dim=1).indices


def _clip(ks: Iterable[int], *, bank_size: int, say: Callable[[str], None]) -> list[int]:
    """The numbers of neighbours that a bank of ``bank_size`` rows can give, ascending, without repeats."""
    asked = sorted(set(ks))
    if not asked or asked[0] < 1:
        raise ValueError(f"ks must be positive: {asked}")
    too_large = [k for k in asked if k > bank_size]
    if too_large:
        say(f"kNN: the bank has {bank_size} images, so k = {', '.join(map(str, too_large))} becomes {bank_size}")
    return sorted({min(k, bank_size) for k in asked})
