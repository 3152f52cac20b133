"""Tasks on features that are extracted once: logistic regression and nearest neighbours."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.labels import confusion_matrix
from ijepa_ds.evaluation.probes.knn import knn_accuracy, nearest_neighbours
from ijepa_ds.evaluation.probes.logistic import linear_probe
from ijepa_ds.evaluation.probes.ridge import ridge_regression
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import (
    Setting,
    any_classes,
    measurement,
)

QUERIES, SHOWN_NEIGHBOURS = 8, 6


KEPT_PAIRS = 2000  # of true and predicted values


def logistic(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """Logistic regression on standardised features, the penalty chosen on a part of train; ridge for continuous labels,
    which are also cut into bins."""
    features = setting.extracted(encoder, crop_share=setting.share())
    return [
        _logistic(setting, encoder, field, features)
        for field in setting.labels or setting.data.fields
        if setting.process.is_main
    ]


def knn(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """Weighted nearest neighbours, k = 10, 20, 100, 200, temperature 0.07."""
    train, validation = setting.extracted(encoder, crop_share=setting.share())
    measurements = []
    for field in setting.labels or setting.data.fields:
        if not setting.process.is_main:
            continue
        classes, began, grid = any_classes(setting, field), time.monotonic(), []
        device = setting.process.device
        for name, columns in encoder.views.items():
            bank, queries = train[:, columns].to(device), validation[:, columns].to(device)
            accuracies = knn_accuracy(
                bank, classes.train, queries, classes.validation, num_classes=classes.num_classes, say=setting.say
            )
            grid += [{"features": name, "k": k, "value": value} for k, value in accuracies.items()]
        chosen = torch.arange(QUERIES).clamp_max(len(validation) - 1) * len(validation) // QUERIES
        # Of the last view: all columns.
        nearest = nearest_neighbours(bank, queries[chosen.to(device)], k=SHOWN_NEIGHBOURS)
        samples = setting.data.samples
        extra = {
            "knn_by_k": {name: {h["k"]: h["value"] for h in grid if h["features"] == name} for name in encoder.views},
            # Sample numbers in the two files.
            "neighbours": [
                {"query": int(samples["validation"][query]), "train": [int(samples["train"][i]) for i in row]}
                for query, row in zip(chosen.tolist(), nearest.tolist(), strict=True)
            ],
        }
        measurements.append(measurement(setting, "knn", field, grid, began, extra=extra))
    return measurements


def regressed(labels: tuple[Tensor, Tensor], features: tuple[Tensor, Tensor], encoder: Encoder) -> dict:
    """Ridge regression of the raw labels on each view: the lowest mean absolute error, and some of its predictions."""
    train_values, values = (part.double() for part in labels)
    fits = {
        name: ridge_regression(features[0][:, columns], train_values, features[1][:, columns], values, seed=0)
        for name, columns in encoder.views.items()
    }
    best = min(fits, key=lambda name: fits[name].mean_absolute_error)
    kept = torch.arange(min(KEPT_PAIRS, len(values))) * len(values) // min(KEPT_PAIRS, len(values))
    return {
        "mean_absolute_error": fits[best].mean_absolute_error,
        "mean_absolute_error_by_features": {name: fit.mean_absolute_error for name, fit in fits.items()},
        "true_values": [round(float(value), 4) for value in values[kept]],
        "predicted_values": [round(float(value), 4) for value in fits[best].predictions[kept]],
    }


def _logistic(setting: Setting, encoder: Encoder, field: str, features: tuple[Tensor, Tensor]) -> Measurement:
    classes, began = any_classes(setting, field), time.monotonic()
    fits = {
        name: linear_probe(
            features[0][:, columns].to(setting.process.device),
            classes.train,
            features[1][:, columns],
            classes.validation,
            num_classes=classes.num_classes,
            seed=0,
        )
        for name, columns in encoder.views.items()
    }
    grid = [{"features": name, "l2": fit.l2, "value": fit.accuracy} for name, fit in fits.items()]
    best = max(fits, key=lambda name: fits[name].accuracy)
    labels = setting.data.labels(field)
    continuous = labels[0].is_floating_point()
    extra = {"class_names": classes.names if classes.num_classes <= 100 else None}
    if continuous:
        extra |= regressed(labels, features, encoder)
    return measurement(
        setting,
        "logistic",
        field,
        grid,
        began,
        extra=extra,
        compared=("mean_absolute_error",) if continuous else (),
        confusion=confusion_matrix(classes, fits[best].predictions),
    )
