"""Task ``lowshot``: a few labelled images, by logistic regression, by the linear grid of heads and by fine-tuning.

The best of the three is reported, and which it was, as in the paper (I-JEPA, appendix A.2); of several draws the mean.

Shapes: n labelled images of all draws, m of validation.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.inputs import CachedInputs, central_crops
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune
from ijepa_ds.evaluation.probes.head_training import TrainedHeads, train_heads
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.recipes import LINEAR
from ijepa_ds.evaluation.probes.standardise import folds, standardise
from ijepa_ds.evaluation.results import Measurement, best_of, mean_and_deviation
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields
from ijepa_ds.evaluation.subsets import Subset, subsets

FINETUNE_BATCH = 512  # the paper's
FINETUNED = "finetuned"  # what stands for the kind of features where the encoder itself was trained
MICRO_BATCH = 64  # images of a backward pass at once


def lowshot(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """A measurement for each label and each number of images a class."""
    return [
        measurement
        for field in class_fields(setting)
        for subset in subsets(setting, field)
        for measurement in _measure(setting, candidate, field, subset)
    ]


def _measure(setting: Setting, candidate: Candidate, field: str, subset: Subset) -> list[Measurement]:
    began, classes = time.monotonic(), any_classes(setting, field)
    used = functools.reduce(np.union1d, subset.draws)  # only these are encoded: of ImageNet's 1 %, not the 99 others
    train = setting.features(candidate, "train", positions=used)
    validation = setting.features(candidate, "validation")
    labels = classes.train[torch.from_numpy(used)]
    draws = [torch.from_numpy(np.searchsorted(used, draw)) for draw in subset.draws]
    names = [f"lowshot {field}/{subset.name}, {candidate}, draw {number}" for number in range(len(draws))]
    grids = [
        _train_grid(setting, candidate, (train[draw], labels[draw]), validation, classes, name)
        for draw, name in zip(draws, names, strict=True)
    ]
    tuned = []
    if setting.options.finetune and candidate.build is not None:
        tuned = [
            _fine_tune(setting, candidate, classes, draw, seed=setting.seed + number, name=names[number])
            for number, draw in enumerate(subset.draws)
        ]
    if not setting.process.is_main:
        return []
    # Each head with its predictions for every draw. Of two that reach the same the first is reported: the regression
    # has no number that was chosen on validation.
    heads: list[tuple[dict[str, Any], list[Tensor]]] = [
        _logistic(setting, view, train[:, columns], validation[:, columns], labels, draws)
        for view, columns in candidate.views.items()
    ]
    for number, point in enumerate(grids[0].grid):
        head = {name: value for name, value in point.items() if name != "value"}
        heads.append((head | {"method": "grid"}, [grid.predictions[:, number] for grid in grids]))
    if tuned:
        heads.append(({"features": FINETUNED, "method": "finetune"}, tuned))
    grid = [head | _scores([classes.accuracy(draw) for draw in predictions]) for head, predictions in heads]
    best, recipe = best_of(grid), _recipe(setting)
    methods = {head["method"]: best_of([point for point in grid if point["method"] == head["method"]]) for head in grid}
    extra = {
        "images": [len(draw) for draw in subset.draws],
        "images_of_each_class": None if subset.name == "list" else int(subset.name),
        "split_list": setting.options.split_list,
        "draws": len(subset.draws),
        "best_method": best["method"],
        "methods": methods,
        "finetuning": dataclasses.asdict(recipe) | {"batch": _batch(setting, len(draws[0]))} if tuned else None,
    }
    measurement = setting.measurement(
        "lowshot",
        f"{field}/{subset.name}",
        grid,
        began,
        classes,
        extra=extra,
        confusion=classes.confusion(heads[grid.index(best)][1][0]),  # of the first draw
    )
    return [dataclasses.replace(measurement, train_images=len(subset.draws[0]))]


def _train_grid(
    setting: Setting,
    candidate: Candidate,
    train: tuple[Tensor, Tensor],
    validation: Tensor,
    classes: Classes,
    name: str,
) -> TrainedHeads:
    """The linear protocol's heads on cached features of one draw."""
    recipe = setting.adapt(LINEAR, len(train[1]))
    inputs = CachedInputs(*train, batch=recipe.batch, seed=setting.seed, process=setting.process)
    return train_heads(
        inputs,
        (validation, classes.validation),
        views=candidate.views,
        num_classes=classes.num_classes,
        recipe=recipe,
        process=setting.process,
        seed=setting.seed,
        progress=setting.progress(name, recipe.epochs * inputs.steps * recipe.batch),
    )


def _logistic(
    setting: Setting, view: str, train: Tensor, validation: Tensor, labels: Tensor, draws: list[Tensor]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Logistic regression on each draw, its strength by cross-validation within the draw.

    Held out once, 15 % would be 2 of 13 images a class, a choice by luck.
    """
    device, strengths, predictions = setting.process.device, [], []
    progress = setting.progress(f"logistic regression, {view}", len(draws), "fits")
    for number, draw in enumerate(draws):
        space, targets = standardise(train[draw].to(device)), labels[draw].to(device)
        fit = logistic_regression(
            space,
            targets,
            num_classes=int(labels.max()) + 1,
            held_out=folds(targets),
            tick=functools.partial(progress.show, number),
        )
        predictions.append(fit.logits(space.apply(validation.to(device))).argmax(dim=1))
        strengths.append(fit.l2)
    progress.end(len(draws))
    return {"features": view, "method": "logistic", "l2": strengths[0]}, predictions


def _fine_tune(
    setting: Setting, candidate: Candidate, classes: Classes, draw: np.ndarray, *, seed: int, name: str
) -> Tensor:
    """Train the whole encoder, from its weights in float32, on augmented images of one draw; predictions [m]."""
    assert candidate.build is not None  # raw pixels have nothing to train
    prepare, recipe, data = setting.normalize(), _recipe(setting), setting.data
    labels = classes.train[torch.from_numpy(draw)]
    inputs = setting.augmented(labels, prepare, batch=_batch(setting, len(draw)), positions=draw, seed=seed)
    loader = data.loader("validation", crop_share=setting.share())
    return fine_tune(
        candidate.build(),
        inputs,
        central_crops(loader, data.samples["validation"], prepare, setting.process),
        num_classes=classes.num_classes,
        recipe=recipe,
        micro_batch=min(MICRO_BATCH, setting.options.micro_batch),
        seed=seed,
        process=setting.process,
        progress=setting.progress(f"{name}, fine-tuning", recipe.epochs * inputs.steps * inputs.batch),
    )


def _recipe(setting: Setting) -> FineTuneRecipe:
    recipe = FineTuneRecipe()
    epochs, lr = setting.options.epochs or recipe.epochs, setting.options.finetune_lr or recipe.lr
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    return dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup, lr=lr)


def _batch(setting: Setting, num_images: int) -> int:
    return min(setting.options.batch or FINETUNE_BATCH, num_images)


def _scores(values: list[float]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(values)
    return {"value": mean, "deviation": deviation, "values": values}
