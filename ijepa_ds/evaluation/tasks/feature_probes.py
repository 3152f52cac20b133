"""Tasks on features that are extracted once: logistic regression and nearest neighbours.

Shapes: n training, m validation images, F features.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.data import SPLITS
from ijepa_ds.evaluation.probes.knn import NEIGHBOURS, nearest_neighbours, usable, vote
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.ridge import ridge_regression
from ijepa_ds.evaluation.probes.standardise import held_out_part, standardise
from ijepa_ds.evaluation.results import Head, Measurement
from ijepa_ds.evaluation.setting import Setting, any_classes

QUERIES, SHOWN_NEIGHBOURS = 8, 6
KEPT_PAIRS = 2000  # of true and predicted values


def logistic(setting: Setting, candidate: Candidate, fields: list[str] | None = None) -> list[Measurement]:
    """Logistic regression on standardised features, the penalty chosen on a part of train.

    Of a continuous label on its bins, beside ridge regression.
    """
    train, validation = (setting.features(candidate, split) for split in SPLITS)
    if not setting.process.is_main:
        return []
    began, device = time.monotonic(), setting.process.device
    classes = {field: any_classes(setting, field) for field in fields or setting.fields()}
    heads: dict[str, list[Head]] = {field: [] for field in classes}
    predictions: dict[str, list[Tensor]] = {field: [] for field in classes}
    progress = setting.progress(f"logistic regression, {candidate}", len(candidate.views) * len(classes), "fits")
    done = 0
    for view, columns in candidate.views.items():
        space = standardise(train[:, columns].to(device))
        rows = space.apply(validation[:, columns].to(device))
        for field in classes:
            labels = classes[field].train.to(device)
            fit = logistic_regression(
                space,
                labels,
                held_out=[held_out_part(labels, seed=0)],
                tick=functools.partial(progress.show, done, field),
            )
            heads[field].append({"features": view, "l2": fit.l2})
            predictions[field].append(fit.logits(rows).argmax(dim=1))
            done += 1
    progress.end(done)
    measurements = []
    for field in classes:
        continuous = setting.data.labels(field)[0].is_floating_point()
        extra = regressed(setting, candidate, field, train, validation) if continuous else None
        scored = classes[field], heads[field], predictions[field]
        measurements.append(setting.measurement("logistic", field, *scored, began, extra=extra))
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
    train, validation = (setting.features(candidate, split) for split in SPLITS)
    if not setting.process.is_main:
        return []
    began, device, samples = time.monotonic(), setting.process.device, setting.data.samples
    ks, found = usable(NEIGHBOURS, len(train), setting.say), {}
    for view, columns in candidate.views.items():
        progress = setting.progress(f"nearest neighbours, {view}, {candidate}", len(validation))
        bank = train[:, columns].to(device)
        found[view] = nearest_neighbours(bank, validation[:, columns], k=ks[-1], tick=progress.show)
        progress.end(len(validation))
    queries = torch.arange(QUERIES).clamp_max(len(validation) - 1) * len(validation) // QUERIES
    nearest = found[view][1][queries.to(device), :SHOWN_NEIGHBOURS]  # by the last view: all columns
    neighbours = [  # sample numbers in the two files
        {"query": int(samples["validation"][query]), "train": samples["train"][row].tolist()}
        for query, row in zip(queries.tolist(), nearest.tolist(), strict=True)
    ]
    measurements = []
    for field in setting.fields():
        classes = any_classes(setting, field)
        labels = classes.train.to(device)
        heads = [{"features": view, "k": k} for view in found for k in ks]
        predictions = [vote(cosine, labels[index], k=k) for cosine, index in found.values() for k in ks]
        extra = {"neighbours": neighbours}
        measurement = setting.measurement("knn", field, classes, heads, predictions, began, extra=extra)
        measurements.append(dataclasses.replace(measurement, confusion=None))
    return measurements
