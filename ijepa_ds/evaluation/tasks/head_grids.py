"""Tasks that train a grid of heads by a published recipe: ImageNet's linear protocol, transfer, CLEVR's two."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.heads import train_heads
from ijepa_ds.evaluation.probes.recipes import LINEAR, PRESETS, Recipe
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.tasks.feature_probes import logistic, regressed


def linear(setting: Setting, candidate: Candidate, classes: dict[str, Classes]) -> Iterator[Measurement]:
    """The ImageNet protocol: LARS, 50 epochs, batch 16384, the whole grid in one pass.

    With --cached on features extracted once, without augmentation, and the logistic regression beside it.
    """
    yield from head_grids(setting, candidate, classes, task="linear", recipe=LINEAR)
    if setting.options.cached:
        yield from logistic(setting, candidate, classes)


def transfer(setting: Setting, candidate: Candidate, classes: dict[str, Classes]) -> Iterator[Measurement]:
    """SGD with Nesterov momentum by the recipe of --preset, on any labelled images."""
    return head_grids(setting, candidate, classes, task="transfer", recipe=PRESETS[setting.options.preset])


def head_grids(
    setting: Setting,
    candidate: Candidate,
    classes: dict[str, Classes],
    *,
    task: str,
    recipe: Recipe,
    regression: bool = False,
) -> Iterator[Measurement]:
    """Train the recipe's heads on each label, on augmented images unless --cached.

    Where the recipe only mirrors, features of all images and of the mirrored ones are made once, which is the same.
    With ``regression`` ridge regression stands beside them, which takes the label as a number.
    """
    for field, of_label in classes.items():
        began, cached, batch = time.monotonic(), setting.options.cached, setting.options.batch or recipe.batch
        adapted = setting.adapt(recipe, len(of_label.train))
        if adapted.batch < batch:
            setting.say(f"the batch of {batch} becomes {adapted.batch}: there are no more training images")
        share = setting.share() if recipe.crop or setting.options.crop_share is not None else 1.0
        validation = setting.features(candidate, "validation", share=share)
        if augmented := recipe.crop and not cached:
            inputs: Inputs = setting.augmented(of_label.train, adapted.batch, candidate.forward)
        else:
            train = setting.features(candidate, "train", share=share)
            mirrored = None if cached else setting.features(candidate, "train", share=share, mirrored=True)
            inputs = setting.cached(train, of_label.train, adapted.batch, mirrored)
        progress = setting.progress(f"{task} {field}, {candidate}", adapted.epochs * inputs.steps * inputs.batch)
        heads, predictions, rate = train_heads(inputs, validation, candidate.views, adapted, progress)
        if not setting.process.is_main:
            continue
        augmentation = "random resized crop, flip" if augmented else "none" if cached else "flip"
        extra = {"epochs": adapted.epochs, "batch": adapted.batch, "augmentation": augmentation}
        if regression:
            extra |= regressed(setting, candidate, field, train, validation)
        scored = of_label, heads, predictions
        yield setting.measurement(task, field, *scored, began, extra=extra, rate=rate if augmented else None)
