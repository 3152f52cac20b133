"""From what one task found for each encoder to a result: none without its baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.evaluation.encoders import Encoder
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.results import BASELINES, TaskResult, best_of

CONFUSION_CLASSES = 100  # a larger matrix is not kept


@dataclass(frozen=True)
class Measurement:
    """One task on one label for one encoder.

    ``grid``: every head tried, each with its "features" and "value". ``extra`` goes to the result where the encoder is
    the trained one; of the baselines' only what ``compared`` names.
    """

    task: str
    label: str
    grid: list[dict[str, Any]]
    train_images: int
    validation_images: int
    seconds: float
    images_per_second: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    confusion: list[list[int]] | None = None
    metric: str = "accuracy"
    unit: str = "%"


def combine(measured: list[tuple[Encoder, list[Measurement]]]) -> list[TaskResult]:
    """The results of all tasks that were measured for the trained encoder and for both baselines.

    Raises:
        AssertionError: a measurement of the trained encoder lacks a baseline.
    """
    by_name: dict[str, dict[tuple[str, str], list[Measurement]]] = {"trained": {}, "random": {}, "pixels": {}}
    for encoder, measurements in measured:
        for one in measurements:
            by_name[encoder.name].setdefault((one.task, one.label), []).append(one)
    results = []
    for key, (own,) in by_name["trained"].items():
        baselines = {}
        for name in BASELINES:
            found = by_name[name].get(key, [])
            assert found, f"{key} has no baseline '{name}'"
            baselines[name] = {
                "values": [best_of(one.grid)["value"] for one in found],
                "grids": [one.grid for one in found],
                **{item: [one.extra.get(item) for one in found] for item in own.compared},
            }
        best = best_of(own.grid)
        results.append(
            TaskResult(
                task=own.task,
                label=own.label,
                metric=own.metric,
                unit=own.unit,
                value=best["value"],
                best_head={name: value for name, value in best.items() if name not in ("value", "values")},
                grid=own.grid,
                baselines=baselines,
                extra=own.extra,
                confusion=own.confusion,
                train_images=own.train_images,
                validation_images=own.validation_images,
                seconds=own.seconds,
                images_per_second=own.images_per_second,
            )
        )
    return results


def confusion_matrix(classes: Classes, predictions: Tensor) -> list[list[int]] | None:
    """Images of each true class (rows) by the class they were given; None where there are too many classes."""
    count = classes.num_classes
    if count > CONFUSION_CLASSES:
        return None
    pairs = classes.validation.cpu() * count + predictions.cpu()
    return torch.bincount(pairs, minlength=count * count).view(count, count).tolist()
