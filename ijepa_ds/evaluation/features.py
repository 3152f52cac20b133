"""Features of a .beton under an encoder, one row an image, with the labels beside them.

Shapes: n images, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.distributed import Process, gather_rows
from ijepa_ds.loader import EvaluationLoader


@dataclass(frozen=True)
class Features:
    """``values`` fp32 [n, D] and ``labels`` {field: [n]}, on the CPU."""

    values: Tensor
    labels: dict[str, Tensor]


def spread_samples(num_samples: int, limit: int | None) -> np.ndarray:
    """At most ``limit`` samples, evenly spread over the file, ascending: every class folder gives its share."""
    if limit is None or limit >= num_samples:
        return np.arange(num_samples)
    return np.arange(limit) * num_samples // limit


@torch.no_grad()
def extract_features(
    forward: Callable[[Tensor], Tensor], loader: EvaluationLoader, samples: np.ndarray, process: Process
) -> Features:
    """``forward`` maps uint8 images [B, H, W, 3] on the device to [B, D]. The ranks share the work; all get all."""
    values, labels = [], {name: [] for name in loader.label_fields}
    for images, found in loader.batches(samples[process.rank :: process.world_size]):
        values.append(forward(images.to(process.device)).float().cpu())
        for name, label in found.items():
            labels[name].append(label)
    rows = gather_rows(torch.cat(values), process)
    return Features(rows, {name: gather_rows(torch.cat(parts), process) for name, parts in labels.items()})
