"""Tasks on features that are extracted once: logistic regression and nearest neighbours.

Shapes: n training, m validation images, F features.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.probes.knn import NEIGHBOURS, nearest_neighbours, usable, vote
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.ridge import ridge_regression
from ijepa_ds.evaluation.probes.standardise import held_out_part, standardise
from ijepa_ds.evaluation.results import Measurement, best_of
from ijepa_ds.evaluation.setting import Setting, any_classes

QUERIES, SHOWN_NEIGHBOURS = 8, 6
KEPT_PAIRS = 2000  # of true and predicted values


def logistic(setting: Setting, candidate: Candidate, fields: list[str] | None = None) -> list[Measurement]:
    """Logistic regression on standardised features, the penalty chosen on a part of train.

    Of a continuous label on its bins, beside ridge regression.
    """
    train, validation = (setting.features(candidate, split) for split in ("train", "validation"))
    if not setting.process.is_main:
        return []
    began, device = time.monotonic(), setting.process.device
    fields = fields or setting.options.label or list(setting.data.fields)
    classes = {field: any_classes(setting, field) for field in fields}
    grids: dict[str, list[dict[str, Any]]] = {field: [] for field in fields}
    predictions: dict[str, list[Tensor]] = {field: [] for field in fields}
    progress = setting.progress(f"logistic regression, {candidate}", len(candidate.views) * len(fields), "fits")
    for number, (view, columns) in enumerate(candidate.views.items()):
        space = standardise(train[:, columns].to(device))
        rows = space.apply(validation[:, columns].to(device))
        for field in fields:
            labels = classes[field].train.to(device)
            fit = logistic_regression(
                space,
                labels,
                num_classes=classes[field].num_classes,
                held_out=[held_out_part(labels, seed=0)],
                tick=functools.partial(progress.show, number * len(fields) + len(grids[field]), field),
            )
            predictions[field].append(fit.logits(rows).argmax(dim=1))
            value = classes[field].accuracy(predictions[field][-1])
            grids[field].append({"features": view, "l2": fit.l2, "value": value})
    progress.end(len(candidate.views) * len(fields))
    measurements = []
    for field, grid in grids.items():
        continuous = setting.data.labels(field)[0].is_floating_point()
        measurements.append(
            setting.measurement(
                "logistic",
                field,
                grid,
                began,
                classes[field],
                extra=regressed(setting, candidate, field, train, validation) if continuous else {},
                confusion=classes[field].confusion(predictions[field][grid.index(best_of(grid))]),
            )
        )
    return measurements


def regressed(setting: Setting, candidate: Candidate, field: str, train: Tensor, validation: Tensor) -> dict[str, Any]:
    """Ridge regression of the raw labels on each view: the lowest mean absolute error, and some of its predictions."""
    train_values, values = (part.double() for part in setting.data.labels(field))
    errors: dict[str, float] = {}
    predictions: dict[str, Tensor] = {}
    for view, columns in candidate.views.items():
        space = standardise(train[:, columns].double())
        _, predictions[view] = ridge_regression(space, train_values, space.apply(validation[:, columns].double()))
        errors[view] = float((predictions[view] - values).abs().mean())
    best = min(errors, key=errors.__getitem__)
    kept = torch.arange(min(KEPT_PAIRS, len(values))) * len(values) // min(KEPT_PAIRS, len(values))
    return {
        "mean_absolute_error": errors[best],
        "mean_absolute_error_by_features": errors,
        "true_values": [round(value, 4) for value in values[kept].tolist()],
        "predicted_values": [round(value, 4) for value in predictions[best][kept].tolist()],
    }


def knn(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """Weighted nearest neighbours, k = 10, 20, 100, 200, temperature 0.07."""
    train, validation = (setting.features(candidate, split) for split in ("train", "validation"))
    if not setting.process.is_main:
        return []
    began, device = time.monotonic(), setting.process.device
    ks = usable(NEIGHBOURS, len(train), setting.say)
    fields = setting.options.label or list(setting.data.fields)
    grids: dict[str, list[dict[str, Any]]] = {field: [] for field in fields}
    for view, columns in candidate.views.items():
        progress = setting.progress(f"nearest neighbours, {view}, {candidate}", len(validation))
        bank = train[:, columns].to(device)
        cosine, index = nearest_neighbours(bank, validation[:, columns], k=ks[-1], tick=progress.show)
        progress.end(len(validation))
        for field, grid in grids.items():
            classes = any_classes(setting, field)
            labels = classes.train.to(device)[index]
            for k in ks:
                predictions = vote(cosine, labels, k=k, num_classes=classes.num_classes)
                grid.append({"features": view, "k": k, "value": classes.accuracy(predictions)})
    queries = torch.arange(QUERIES).clamp_max(len(validation) - 1) * len(validation) // QUERIES
    nearest = index[queries.to(device), :SHOWN_NEIGHBOURS]  # by the last view: all columns
    samples = setting.data.samples
    neighbours = [  # sample numbers in the two files
        {"query": int(samples["validation"][query]), "train": samples["train"][row].tolist()}
        for query, row in zip(queries.tolist(), nearest.tolist(), strict=True)
    ]
    return [
        setting.measurement("knn", field, grid, began, any_classes(setting, field), extra={"neighbours": neighbours})
        for field, grid in grids.items()
    ]
