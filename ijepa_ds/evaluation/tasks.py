"""The tasks of the evaluation. Each measures one encoder at a time, the trained one and its baselines alike.

A task is a function of a :class:`~ijepa_ds.evaluation.setting.Setting` and an
:class:`~ijepa_ds.evaluation.encoders.Encoder` that gives measurements; all processes call it together, and the main
one's are kept. To add one, write the function and name it in :data:`TASKS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ijepa_ds.evaluation.attentive_task import attentive
from ijepa_ds.evaluation.encoders import Encoder
from ijepa_ds.evaluation.head_training import AugmentedFeatures, CachedFeatures, train_heads
from ijepa_ds.evaluation.knn import knn_accuracy, nearest_neighbours
from ijepa_ds.evaluation.labels import Classes, classes_of
from ijepa_ds.evaluation.linear import linear_probe, ridge_regression
from ijepa_ds.evaluation.lowshot_task import lowshot, subsets
from ijepa_ds.evaluation.measurement import Measurement, confusion_matrix
from ijepa_ds.evaluation.recipes import COUNT, DEPTH, LINEAR, PRESETS, Recipe
from ijepa_ds.evaluation.setting import (
    Setting,
    any_classes,
    augmented_loader,
    class_fields,
    depth_bins,
    measurement,
    own_field,
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


def linear(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """The ImageNet protocol: LARS, 50 epochs, batch 16384, the whole grid in one pass. With --cached: on features
    extracted once, without augmentation, and the logistic regression beside it."""
    measurements = []
    for field in class_fields(setting):
        measurements += head_grid(setting, encoder, "linear", field, any_classes(setting, field), LINEAR)
        if setting.cached and setting.process.is_main:
            features = setting.extracted(encoder, crop_share=setting.share())
            measurements.append(_logistic(setting, encoder, field, features))
    return measurements


def transfer(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """SGD with Nesterov momentum by the recipe of ``setting.preset``, on any labelled images."""
    return [
        one
        for field in class_fields(setting)
        for one in head_grid(setting, encoder, "transfer", field, any_classes(setting, field), PRESETS[setting.preset])
    ]


def count(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """Clevr/Count: the number of objects as a class; and as a number, by ridge regression."""
    field = own_field(setting, "count")
    classes = classes_of(field, *setting.data.labels(field))
    return head_grid(setting, encoder, "count", field, classes, COUNT, regression=True)


def depth(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """Clevr/Dist: the depth of the nearest object, in six bins; and as a number, by ridge regression."""
    field = own_field(setting, "depth")
    return head_grid(setting, encoder, "depth", field, depth_bins(setting, field), DEPTH, regression=True)


def head_grid(
    setting: Setting,
    encoder: Encoder,
    task: str,
    field: str,
    classes: Classes,
    recipe: Recipe,
    *,
    regression: bool = False,
) -> list[Measurement]:
    """Train the recipe's heads on ``field``. Augmented unless --cached; where the recipe only mirrors, features of all
    images and of the mirrored ones are made once, which is the same."""
    data, began = setting.data, time.monotonic()
    recipe = setting.adapt(recipe)
    share = setting.share() if recipe.crop or setting.crop_share is not None else 1.0
    validation = data.features(encoder, "validation", crop_share=share)
    device = setting.process.device
    if recipe.crop and not setting.cached:
        training = AugmentedFeatures(encoder, augmented_loader(setting), data.samples["train"], device)
    else:
        train = data.features(encoder, "train", crop_share=share)
        mirrors = recipe.flip and not setting.cached
        mirrored = data.features(encoder, "train", crop_share=share, mirrored=True) if mirrors else None
        training = CachedFeatures(train, mirrored, seed=setting.seed, device=device)
    trained = train_heads(
        training, validation, classes, encoder, recipe, process=setting.process, seed=setting.seed, say=setting.say
    )
    if not setting.process.is_main:
        return []
    rate = trained.images / trained.seconds if isinstance(training, AugmentedFeatures) else data.images_per_second()
    extra = {
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "augmentation": _augmentation_name(training),
        "class_names": classes.names if classes.num_classes <= 100 else None,
    }
    if regression:
        extra |= regressed(data.labels(field), (train, validation), encoder)
    return [
        measurement(
            setting,
            task,
            field,
            trained.grid,
            began,
            rate=rate,
            extra=extra,
            compared=("mean_absolute_error",) if regression else (),
            confusion=confusion_matrix(classes, trained.predictions),
        )
    ]


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


def check_tasks(setting: Setting, tasks: list[str]) -> None:
    """Refuse what the last of ``tasks`` would stumble over before the first has run for hours.

    Raises:
        UserError: a label or classes that a task cannot use.
    """
    for task in tasks:
        if task in ("logistic", "knn"):
            fields = setting.labels or setting.data.fields
        else:
            fields = (own_field(setting, task),) if task in ("count", "depth") else class_fields(setting)
        for field in fields:
            if task == "count":
                classes_of(field, *setting.data.labels(field))
            elif task == "depth":
                depth_bins(setting, field)
            else:
                any_classes(setting, field)
            if task == "lowshot":
                subsets(setting, field)


def _augmentation_name(training: AugmentedFeatures | CachedFeatures) -> str:
    if isinstance(training, AugmentedFeatures):
        return "random resized crop, flip"
    return "none" if training.mirrored is None else "flip"


Measure = Callable[[Setting, Encoder], list[Measurement]]
TASKS: dict[str, Measure] = {
    "logistic": logistic,
    "knn": knn,
    "linear": linear,
    "count": count,
    "depth": depth,
    "transfer": transfer,
    "lowshot": lowshot,
    "attentive": attentive,
}
DEFAULT_TASKS = ("logistic", "knn")
