"""Tasks that train a grid of heads by a published recipe: ImageNet's linear protocol, transfer, CLEVR's two."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.inputs import CachedInputs, Inputs
from ijepa_ds.evaluation.labels import Classes, classes_of
from ijepa_ds.evaluation.probes.head_training import train_heads
from ijepa_ds.evaluation.probes.recipes import COUNT, DEPTH, LINEAR, PRESETS, Recipe
from ijepa_ds.evaluation.results import Measurement, best_of
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields, depth_bins, own_field
from ijepa_ds.evaluation.tasks.feature_probes import logistic, regressed


def linear(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """The ImageNet protocol: LARS, 50 epochs, batch 16384, the whole grid in one pass.

    With --cached on features extracted once, without augmentation, and the logistic regression beside it.
    """
    measurements = [
        measurement
        for field in class_fields(setting)
        for measurement in head_grid(setting, candidate, "linear", field, any_classes(setting, field), LINEAR)
    ]
    return measurements + (logistic(setting, candidate, class_fields(setting)) if setting.options.cached else [])


def transfer(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """SGD with Nesterov momentum by the recipe of --preset, on any labelled images."""
    recipe = PRESETS[setting.options.preset]
    return [
        measurement
        for field in class_fields(setting)
        for measurement in head_grid(setting, candidate, "transfer", field, any_classes(setting, field), recipe)
    ]


def count(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """Clevr/Count: the number of objects as a class; and as a number, by ridge regression."""
    field = own_field(setting, "count")
    classes = classes_of(field, *setting.data.labels(field))
    return head_grid(setting, candidate, "count", field, classes, COUNT, regression=True)


def depth(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """Clevr/Dist: the depth of the nearest object, in six bins; and as a number, by ridge regression."""
    field = own_field(setting, "depth")
    return head_grid(setting, candidate, "depth", field, depth_bins(setting, field), DEPTH, regression=True)


def head_grid(
    setting: Setting,
    candidate: Candidate,
    task: str,
    field: str,
    classes: Classes,
    recipe: Recipe,
    *,
    regression: bool = False,
) -> list[Measurement]:
    """Train the recipe's heads on ``field``, on augmented images unless --cached.

    Where the recipe only mirrors, features of all images and of the mirrored ones are made once, which is the same.
    """
    began, recipe, cached = time.monotonic(), setting.adapt(recipe), setting.options.cached
    share = setting.share() if recipe.crop or setting.options.crop_share is not None else 1.0
    validation = setting.features(candidate, "validation", share=share)
    if augmented := recipe.crop and not cached:
        inputs: Inputs = setting.augmented(classes.train, candidate.forward, batch=recipe.batch)
    else:
        train = setting.features(candidate, "train", share=share)
        mirrored = None if cached else setting.features(candidate, "train", share=share, mirrored=True)
        shared: dict[str, Any] = {"batch": recipe.batch, "seed": setting.seed, "process": setting.process}
        inputs = CachedInputs(train, classes.train, mirrored, **shared)
    trained = train_heads(
        inputs,
        (validation, classes.validation),
        views=candidate.views,
        num_classes=classes.num_classes,
        recipe=recipe,
        process=setting.process,
        seed=setting.seed,
        progress=setting.progress(f"{task} {field}, {candidate}", recipe.epochs * inputs.steps * recipe.batch),
    )
    if not setting.process.is_main:
        return []
    augmentation = "random resized crop, flip" if augmented else "none" if cached else "flip"
    extra = {"epochs": recipe.epochs, "batch": recipe.batch, "augmentation": augmentation}
    if regression:
        extra |= regressed(setting, candidate, field, train, validation)
    measurement = setting.measurement(
        task,
        field,
        trained.grid,
        began,
        classes,
        extra=extra,
        confusion=classes.confusion(trained.predictions[:, trained.grid.index(best_of(trained.grid))]),
    )
    return [replace(measurement, images_per_second=trained.images_per_second) if augmented else measurement]
