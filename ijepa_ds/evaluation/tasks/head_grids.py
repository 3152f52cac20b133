"""The tasks of the evaluation. Each measures one encoder at a time, the trained one and its baselines alike.

A task is a function of a :class:`~ijepa_ds.evaluation.setting.Setting` and an
:class:`~ijepa_ds.evaluation.candidates.Encoder` that gives measurements; all processes call it together, and the main
one's are kept. To add one, write the function and name it in :data:`TASKS`.
"""

from __future__ import annotations

import time

from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.inputs import AugmentedFeatures, CachedFeatures
from ijepa_ds.evaluation.labels import Classes, classes_of, confusion_matrix
from ijepa_ds.evaluation.probes.head_training import train_heads
from ijepa_ds.evaluation.probes.recipes import COUNT, DEPTH, LINEAR, PRESETS, Recipe
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import (
    Setting,
    any_classes,
    augmented_loader,
    class_fields,
    depth_bins,
    measurement,
    own_field,
)
from ijepa_ds.evaluation.tasks.feature_probes import _logistic, regressed


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


def _augmentation_name(training: AugmentedFeatures | CachedFeatures) -> str:
    if isinstance(training, AugmentedFeatures):
        return "random resized crop, flip"
    return "none" if training.mirrored is None else "flip"
