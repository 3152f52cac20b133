"""Tasks that train a grid of heads by a published recipe: ImageNet's linear protocol, transfer, CLEVR's two."""

from __future__ import annotations

import time

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.labels import Classes, classes_of
from ijepa_ds.evaluation.probes.head_training import train_heads
from ijepa_ds.evaluation.probes.recipes import COUNT, DEPTH, LINEAR, PRESETS, Recipe
from ijepa_ds.evaluation.results import Measurement
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
    began, cached, batch = time.monotonic(), setting.options.cached, setting.options.batch or recipe.batch
    recipe = setting.adapt(recipe, len(classes.train))
    if recipe.batch < batch:
        setting.say(f"the batch of {batch} becomes {recipe.batch}: there are no more training images")
    share = setting.share() if recipe.crop or setting.options.crop_share is not None else 1.0
    validation = setting.features(candidate, "validation", share=share)
    if augmented := recipe.crop and not cached:
        inputs: Inputs = setting.augmented(classes.train, recipe.batch, candidate.forward)
    else:
        train = setting.features(candidate, "train", share=share)
        mirrored = None if cached else setting.features(candidate, "train", share=share, mirrored=True)
        inputs = setting.cached(train, classes.train, recipe.batch, mirrored)
    progress = setting.progress(f"{task} {field}, {candidate}", recipe.epochs * inputs.steps * inputs.batch)
    heads, predictions, rate = train_heads(inputs, validation, candidate.views, recipe, progress)
    if not setting.process.is_main:
        return []
    augmentation = "random resized crop, flip" if augmented else "none" if cached else "flip"
    extra = {"epochs": recipe.epochs, "batch": recipe.batch, "augmentation": augmentation}
    if regression:
        extra |= regressed(setting, candidate, field, train, validation)
    scored = classes, heads, predictions
    return [setting.measurement(task, field, *scored, began, extra=extra, rate=rate if augmented else None)]
