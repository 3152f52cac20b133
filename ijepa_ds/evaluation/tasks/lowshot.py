"""Task ``lowshot``: a few labelled images, by logistic regression, by the linear grid of heads and by fine-tuning.

The best of the three is reported, and which it was, as in the paper (I-JEPA, appendix A.2); of several draws the mean.

Shapes: n labelled images of a draw, m of validation, F features, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.inputs import central_crops
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune
from ijepa_ds.evaluation.probes.head_training import train_heads
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.recipes import LINEAR
from ijepa_ds.evaluation.probes.standardise import folds, standardise
from ijepa_ds.evaluation.results import Head, Measurement, best_of
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields
from ijepa_ds.evaluation.subsets import Subset, subsets
from ijepa_ds.method.encoder import VisionTransformer

FINETUNE_BATCH = 512  # the paper's
FINETUNED = "finetuned"  # what stands for the kind of features where the encoder itself was trained
MICRO_BATCH = 64  # images of a backward pass at once
Method = tuple[list[Head], list[Tensor]]  # heads, and the predictions [m] of each


def lowshot(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """A measurement for each label and each number of images a class."""
    return [
        measurement
        for field in class_fields(setting)
        for subset in subsets(setting, field)
        for measurement in _measure(setting, candidate, field, subset)
    ]


def _measure(setting: Setting, candidate: Candidate, field: str, subset: Subset) -> list[Measurement]:
    began, classes, name = time.monotonic(), any_classes(setting, field), f"{field}/{subset.name}"
    used = functools.reduce(np.union1d, subset.draws)  # only these are encoded: of ImageNet's 1 %, not the 99 others
    train, validation = setting.features(candidate, "train", positions=used), setting.features(candidate, "validation")
    draws: list[list[Method]] = []
    for number, positions in enumerate(subset.draws):
        rows, labels = train[np.searchsorted(used, positions)], classes.train[positions]
        work = f"lowshot {name}, {candidate}, draw {number}"
        # Of two heads that reach the same the first is reported: the regression has no number chosen on validation.
        draws.append(
            [
                _logistic(setting, candidate, rows, labels, validation, work),
                _grid(setting, candidate, rows, labels, validation, work),
            ]
        )
        if setting.options.finetune and candidate.build is not None:
            seed = setting.seed + number
            draws[-1].append(_fine_tune(setting, candidate.build(), positions, labels, seed=seed, work=work))
    if not setting.process.is_main:
        return []
    heads = [head for heads, _ in draws[0] for head in heads]
    by_draw = [[rows.cpu() for _, predictions in draw for rows in predictions] for draw in draws]
    predictions = list(map(torch.stack, zip(*by_draw, strict=True)))  # of each head [draws, m]
    measurement = setting.measurement("lowshot", name, classes, heads, predictions, began)
    methods: dict[str, list[Head]] = {}
    for head in measurement.grid:
        methods.setdefault(head["method"], []).append(head)
    recipe = dataclasses.asdict(_recipe(setting)) | {"batch": _batch(setting, len(subset.draws[0]))}
    extra = {
        "images": [len(draw) for draw in subset.draws],
        "images_of_each_class": None if subset.name == "list" else int(subset.name),
        "split_list": setting.options.split_list,
        "draws": len(draws),
        "best_method": best_of(measurement.grid)["method"],
        "methods": {method: best_of(grid) for method, grid in methods.items()},
        "finetuning": recipe if "finetune" in methods else None,
    }
    return [dataclasses.replace(measurement, train_images=len(subset.draws[0]), extra=measurement.extra | extra)]


def _logistic(
    setting: Setting, candidate: Candidate, rows: Tensor, labels: Tensor, validation: Tensor, work: str
) -> Method:
    """Logistic regression on each view, its strength by cross-validation within the draw; on the main process.

    Held out once, 15 % would be 2 of 13 images a class, a choice by luck.
    """
    labels = labels.to(setting.process.device)
    heads: list[Head] = []
    predictions: list[Tensor] = []
    progress = setting.progress(f"{work}, logistic regression", len(candidate.views), "fits")
    for view, columns in candidate.views.items() if setting.process.is_main else ():
        space = standardise(rows[:, columns].to(labels.device))
        tick = functools.partial(progress.show, len(heads))
        fit = logistic_regression(space, labels, held_out=folds(labels), tick=tick)
        heads.append({"features": view, "method": "logistic", "l2": fit.l2})
        predictions.append(fit.logits(space.apply(validation[:, columns].to(labels.device))).argmax(dim=1))
    progress.end(len(heads))
    return heads, predictions


def _grid(
    setting: Setting, candidate: Candidate, rows: Tensor, labels: Tensor, validation: Tensor, work: str
) -> Method:
    """The linear protocol's heads on features made once."""
    recipe = setting.adapt(LINEAR, len(labels))
    inputs = setting.cached(rows, labels, recipe.batch)
    progress = setting.progress(f"{work}, grid", recipe.epochs * inputs.steps * inputs.batch)
    heads, predictions, _ = train_heads(inputs, validation, candidate.views, recipe, progress)
    return [{"features": head["features"], "method": "grid"} | head for head in heads], predictions


def _fine_tune(
    setting: Setting, encoder: VisionTransformer, positions: np.ndarray, labels: Tensor, *, seed: int, work: str
) -> Method:
    """The whole encoder, trained on augmented images."""
    prepare, recipe, samples = setting.normalize(), _recipe(setting), setting.data.samples["validation"]
    inputs = setting.augmented(labels, _batch(setting, len(labels)), prepare, positions=positions, seed=seed)
    loader = setting.data.loader("validation", crop_share=setting.share())
    crops = central_crops(loader, samples, prepare, setting.process)
    progress = setting.progress(f"{work}, fine-tuning", recipe.epochs * inputs.steps * inputs.batch)
    micro_batch = min(MICRO_BATCH, setting.options.micro_batch)
    predictions = fine_tune(encoder, inputs, crops, recipe, progress, micro_batch=micro_batch)
    return [{"features": FINETUNED, "method": "finetune"}], [predictions]


def _recipe(setting: Setting) -> FineTuneRecipe:
    recipe, options = FineTuneRecipe(), setting.options
    epochs, lr = options.epochs or recipe.epochs, options.finetune_lr or recipe.lr
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    return dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup, lr=lr)


def _batch(setting: Setting, num_images: int) -> int:
    return min(setting.options.batch or FINETUNE_BATCH, num_images)
