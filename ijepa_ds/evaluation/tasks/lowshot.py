"""Task ``lowshot``: a few labelled images, by logistic regression, by the linear grid of heads and by fine-tuning.

The best of the three is reported, and which it was, as in the paper (I-JEPA, appendix A.2); of several draws the mean.

Shapes: n labelled images of a draw, m of validation, F features, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.build import input_of_encoder
from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.inputs import central_crops
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune
from ijepa_ds.evaluation.probes.heads import train_heads
from ijepa_ds.evaluation.probes.recipes import LINEAR
from ijepa_ds.evaluation.probes.standardise import folds
from ijepa_ds.evaluation.results import Head, Measurement, best_of
from ijepa_ds.evaluation.setting import Setting, any_classes
from ijepa_ds.evaluation.subsets import subsets
from ijepa_ds.evaluation.tasks.feature_probes import logistic_heads
from ijepa_ds.method.encoder import VisionTransformer

FINETUNE_BATCH = 512  # the paper's
FINETUNED = "finetuned"  # what stands for the kind of features where the encoder itself was trained
Method = tuple[list[Head], list[Tensor]]  # heads, and the predictions [m] of each


def few_labels(setting: Setting, field: str) -> Classes:
    """Classes that have as many images as the subsets take."""
    classes = any_classes(setting, field)
    subsets(setting, field, classes)
    return classes


def lowshot(setting: Setting, candidate: Candidate, classes: dict[str, Classes]) -> Iterator[Measurement]:
    """A measurement for each label and each number of images a class."""
    for field, of_label in classes.items():
        for subset, draws in subsets(setting, field, of_label).items():
            yield from _measure(setting, candidate, f"{field}/{subset}", of_label, draws)


def _measure(
    setting: Setting, candidate: Candidate, name: str, classes: Classes, subset: list[np.ndarray]
) -> Iterator[Measurement]:
    began, options = time.monotonic(), setting.options
    used = functools.reduce(np.union1d, subset)  # only these are encoded: of ImageNet's 1 %, not the 99 others
    train, validation = setting.features(candidate, "train", positions=used), setting.features(candidate, "validation")
    draws: list[dict[str, Method]] = []
    for number, positions in enumerate(subset):
        rows, labels = train[np.searchsorted(used, positions)], classes.train[positions]
        work = f"lowshot {name}, {candidate}, draw {number}"
        draws.append(_frozen(setting, candidate, rows, labels, validation, work))
        if options.finetune and candidate.build is not None:
            draws[-1]["finetune"] = _fine_tune(setting, candidate.build(), positions, labels, draw=number, work=work)
    if not setting.process.is_main:
        return
    # Of two heads that reach the same the first is reported: the regression has no number chosen on validation.
    heads = [head | {"method": method} for method, (of_method, _) in draws[0].items() for head in of_method]
    by_draw = [[rows.cpu() for _, predictions in draw.values() for rows in predictions] for draw in draws]
    predictions = list(map(torch.stack, zip(*by_draw, strict=True)))  # of each head [draws, m]
    measurement = setting.measurement("lowshot", name, classes, heads, predictions, began)
    recipe, batch = _course(setting, len(subset[0]))
    methods = {m: best_of([head for head in measurement.grid if head["method"] == m]) for m in draws[0]}
    extra = {
        "images": [len(positions) for positions in subset],
        "images_of_each_class": None if options.split_list else len(subset[0]) // classes.num_classes,
        "split_list": options.split_list,
        "draws": len(draws),
        "best_method": best_of(measurement.grid)["method"],
        "methods": methods,
        "finetuning": dataclasses.asdict(recipe) | {"batch": batch} if "finetune" in methods else None,
    }
    yield dataclasses.replace(measurement, train_images=len(subset[0]), extra=measurement.extra | extra)


def _frozen(
    setting: Setting, candidate: Candidate, rows: Tensor, labels: Tensor, validation: Tensor, work: str
) -> dict[str, Method]:
    """Logistic regression, on the main process, and the linear protocol's heads, both on features made once.

    The regression's strength is chosen by cross-validation: held out once, 15 % would be 2 of 13 images a class, a
    choice by luck.
    """
    fits = logistic_heads(setting, candidate, rows, validation, {work: labels}, held_out=folds, work=work)
    recipe = setting.adapt(LINEAR, len(labels))
    inputs = setting.cached(rows, labels, recipe.batch)
    progress = setting.progress(f"{work}, grid", recipe.epochs * inputs.steps * inputs.batch)
    heads, predictions, _ = train_heads(inputs, validation, candidate.views, recipe, progress)
    return {"logistic": fits[work], "grid": (heads, predictions)}


def _fine_tune(
    setting: Setting, encoder: VisionTransformer, positions: np.ndarray, labels: Tensor, *, draw: int, work: str
) -> Method:
    """The whole encoder, trained on augmented images."""
    prepare = input_of_encoder(setting.config, setting.process.device, torch.float32)
    (recipe, batch), samples = _course(setting, len(labels)), setting.data.samples["validation"]
    inputs = setting.augmented(labels, batch, prepare, positions=positions, draw=draw)
    loader = setting.data.loader("validation", crop_share=setting.share())
    crops = central_crops(loader, samples, prepare, setting.process)
    progress = setting.progress(f"{work}, fine-tuning", recipe.epochs * inputs.steps * inputs.batch)
    return [{"features": FINETUNED}], [fine_tune(encoder, inputs, crops, recipe, progress)]


def _course(setting: Setting, num_images: int) -> tuple[FineTuneRecipe, int]:
    """The recipe of fine-tuning with the options' numbers, and its batch."""
    recipe, options = FineTuneRecipe(), setting.options
    epochs, lr = options.epochs or recipe.epochs, options.finetune_lr or recipe.lr
    warmup, micro_batch = recipe.warmup_epochs * epochs / recipe.epochs, min(recipe.micro_batch, options.micro_batch)
    recipe = dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup, lr=lr, micro_batch=micro_batch)
    return recipe, min(options.batch or FINETUNE_BATCH, num_images)
