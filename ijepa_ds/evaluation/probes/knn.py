"""Weighted nearest-neighbour classifier on frozen features: no training, so it can watch a run.

The protocol of instance discrimination (arXiv 1805.01978, section 3.4), as DINO and others report it: the vote of the k
nearest rows of the bank, each weighted by exp(cosine / temperature).

Shapes: n rows of the bank, q queries, D features, k neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK_ELEMENTS = 2**23  # similarities held at once: 32 MiB in float32


@torch.no_grad()
def nearest_neighbours(
    bank: Tensor, queries: Tensor, *, k: int, tick: Callable[[int], object] = lambda done: None
) -> tuple[Tensor, Tensor]:
    """The k rows of ``bank`` [n, D] nearest to each of ``queries`` [q, D]: cosine and index [q, k], nearest first.

    The work is done in float32 on the bank's device; ``tick`` is called with the number of queries done.
    """
    bank, nearest = F.normalize(bank.float(), dim=1), []
    for chunk in queries.split(max(1, CHUNK_ELEMENTS // len(bank))):
        similarities = F.normalize(chunk.to(bank.device).float(), dim=1) @ bank.T
        nearest.append(similarities.topk(k, dim=1))
        tick(sum(len(cosine) for cosine, _ in nearest))
    return torch.cat([cosine for cosine, _ in nearest]), torch.cat([index for _, index in nearest])


@torch.no_grad()
def vote(cosine: Tensor, labels: Tensor, *, k: int, temperature: float = TEMPERATURE) -> Tensor:
    """The class [q] that the first k neighbours give each query, from their cosine and their labels [q, all]."""
    weights = weights_of(cosine[:, :k], temperature)
    num_classes, classes = int(labels.max()) + 1, []
    chunk = max(1, CHUNK_ELEMENTS // num_classes)
    for part, part_labels in zip(weights.split(chunk), labels[:, :k].split(chunk), strict=True):
        classes.append(votes(part, part_labels, num_classes).argmax(dim=1))
    return torch.cat(classes)


def weights_of(cosine: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How much each neighbour counts, [q, k], by its cosine; nearest first."""
    # Relative to the nearest: the same vote, and no overflow at a small temperature.
    return ((cosine - cosine[:, :1]) / temperature).exp()


def votes(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The sum of the neighbours' ``weights`` [q, k] for each class of their ``labels`` [q, k]: [q, C]."""
    return torch.zeros(len(weights), num_classes, device=weights.device).scatter_add_(1, labels, weights)


def usable(ks: Sequence[int], bank_size: int, say: Callable[[str], None]) -> list[int]:
    """The numbers of neighbours that a bank can give, ascending; ``say`` takes a line where one is too large."""
    if too_large := [k for k in ks if k > bank_size]:
        say(f"kNN: the bank has {bank_size} images, so k = {', '.join(map(str, too_large))} becomes {bank_size}")
    return sorted({min(k, bank_size) for k in ks})
