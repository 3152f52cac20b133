"""What the probes of patches have right, summed over the validation images of all processes.

Shapes: B images, N patches, F features of a patch, h x w pixels of a mask, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.distributed import Process, sum_over_ranks
from ijepa_ds.evaluation.dense_data import DenseData, Example
from ijepa_ds.evaluation.dense_folders import IGNORED, read_depth, read_image
from ijepa_ds.evaluation.features import spread_samples
from ijepa_ds.evaluation.labels import KEPT_CLASSES
from ijepa_ds.evaluation.probes.patch_probes import DEPTH, SEGMENTATION, Probe, Truth
from ijepa_ds.evaluation.probes.patch_scores import (
    confusion,
    intersection_over_union,
    mean_iou,
    pixel_accuracy,
    upsampled_classes,
)
from ijepa_ds.evaluation.results import RMSE, Head, Measurement, best_of

SHOWN = 6  # images in a picture


class Scores:
    """What every probe has right, summed over images, and what it said of a few."""

    def __init__(self, probes: list[Probe], truth: Truth, data: DenseData, process: Process) -> None:
        self.probes, self.truth, self.data, self.process = probes, truth, data, process
        count, device = len(data.names), process.device
        self.confusions = torch.zeros(len(probes), count, count, dtype=torch.int64, device=device)
        self.errors = torch.zeros(len(probes), 2, dtype=torch.float64, device=device)  # sum of squares, and number
        mine = np.arange(process.rank, len(data.samples["validation"]), process.world_size)
        self.shown = set(mine[spread_samples(len(mine), SHOWN)].tolist())
        self._said: dict[tuple[str, int], list[np.ndarray]] = {}  # by label and image, of each probe

    def add(self, images: list[int], rows: Tensor, masks: list[Tensor]) -> None:
        """Count what the probes say of validation ``images``, whose patches are ``rows`` [B, N, F]."""
        size, depth = len(images), self.data.patches["validation"].depth
        true_depth = None if depth is None else torch.from_numpy(depth[images]).to(rows.device)
        masks = [mask.to(rows.device) for mask in masks]
        for number, probe in enumerate(self.probes):
            told = probe.predict(rows.flatten(0, 1))
            if SEGMENTATION in told:
                self._add_classes(number, images, told[SEGMENTATION].unflatten(0, (size, -1)), masks)
            if true_depth is not None:
                predicted = told[DEPTH].view(size, -1)
                known = torch.isfinite(true_depth)
                squares = (predicted - true_depth)[known].double().square().sum()
                self.errors[number] += torch.stack([squares, known.sum().double()])
                for image, values in zip(images, predicted, strict=True):
                    self._keep(DEPTH, image, values.view(self.data.grid))

    def _add_classes(self, number: int, images: list[int], scores: Tensor, masks: list[Tensor]) -> None:
        count = len(self.data.names)
        for image, of_image, mask in zip(images, scores, masks, strict=True):
            classes = self.truth.present[upsampled_classes(of_image, self.data.grid, (mask.shape[0], mask.shape[1]))]
            self.confusions[number] += confusion(mask, classes, count, ignored=IGNORED)
            self._keep(SEGMENTATION, image, classes)

    def _keep(self, label: str, image: int, values: Tensor) -> None:
        if image in self.shown:
            self._said.setdefault((label, image), []).append(values.cpu().numpy())

    def sum_over_ranks(self) -> None:
        """Join what all processes have counted."""
        self.confusions, self.errors = (sum_over_ranks(part, self.process) for part in (self.confusions, self.errors))

    def heads(self, label: str) -> list[Head]:
        """The head of each probe with its value."""
        if label == DEPTH:
            errors = self.errors.cpu()
            values = [{"value": float((squares / number).sqrt())} for squares, number in errors]
        else:
            counts = self.confusions.cpu()
            values = [{"value": mean_iou(part), "pixel_accuracy": pixel_accuracy(part)} for part in counts]
        return [probe.heads[label] | value for probe, value in zip(self.probes, values, strict=True)]

    def measurements(self, began: float, rate: float, *, num_patches: int) -> Iterator[Measurement]:
        """One for each method and label; ``began`` is when the task did, ``rate`` in images per second."""
        train, validation = (len(samples) for samples in self.data.samples.values())
        for label in self.probes[0].heads:
            heads = self.heads(label)
            metric = {"metric": RMSE, "unit": ""} if label == DEPTH else {"metric": "mean IoU", "unit": "%"}
            for method in ("linear", "knn"):
                extra, counts = self._details(label, method, heads)
                yield Measurement(
                    task=f"dense_{method}",
                    label=label,
                    **metric,
                    train_images=train,
                    validation_images=validation,
                    seconds=round(time.monotonic() - began, 2),
                    images_per_second=rate,
                    grid=[head for probe, head in zip(self.probes, heads, strict=True) if probe.method == method],
                    extra=extra | {"patches": num_patches, "folder": str(self.data.path)},
                    confusion=counts,
                )

    def _best(self, label: str, method: str, heads: list[Head]) -> int:
        """Which probe of a method does best."""
        numbers = [number for number, probe in enumerate(self.probes) if probe.method == method]
        return heads.index(best_of([heads[number] for number in numbers], lower=label == DEPTH))

    def _details(self, label: str, method: str, heads: list[Head]) -> tuple[dict[str, Any], list[list[int]] | None]:
        """What is written beside the values, and the confusion of pixels where there are not too many classes."""
        extra: dict[str, Any] = {}
        if self.probes[-1].method == "position":
            extra["position_alone"] = heads[-1]["value"]
        if label == DEPTH:
            return extra, None
        counts = self.confusions[self._best(label, method, heads)].cpu()
        ious = [round(value, 4) if value == value else None for value in intersection_over_union(counts).tolist()]
        names = self.data.names
        extra |= {"class_names": names, "iou": ious, "counted": "pixels"}
        return extra, counts.tolist() if len(names) <= KEPT_CLASSES else None

    def examples(self) -> dict[str, list[Example]]:
        """The images that are shown with their truth and the best probe's prediction of each method, by picture."""
        found: dict[str, list[Example]] = {}
        for (label, image), said in sorted(self._said.items()):
            sample, heads = self.data.samples["validation"][image], self.heads(label)
            path = sample.depth if label == DEPTH else sample.mask
            assert path is not None
            truth = read_depth(path) if label == DEPTH else self.data.folder.read_mask(path)
            predictions = {method: said[self._best(label, method, heads)] for method in ("linear", "knn")}
            found.setdefault(f"dense_{label}", []).append(Example(read_image(sample.image), truth, predictions))
        return found
