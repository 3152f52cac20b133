"""Task ``lowshot``: a few labelled images, by logistic regression, by the linear grid of heads and by fine-tuning.

The best of the three is reported, and which it was, as in the paper (I-JEPA, appendix A.2); of several draws the mean.

Shapes: n training images in use, m of validation, F features.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.inputs import AugmentedBatches, CachedFeatures, validation_batches
from ijepa_ds.evaluation.labels import Classes, confusion_matrix
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune
from ijepa_ds.evaluation.probes.head_training import TrainedHeads, train_heads
from ijepa_ds.evaluation.probes.logistic import LowShot, low_shot
from ijepa_ds.evaluation.probes.recipes import LINEAR
from ijepa_ds.evaluation.results import Measurement, best_of
from ijepa_ds.evaluation.setting import Setting, any_classes, augmented_loader, class_fields, measurement, normalized
from ijepa_ds.evaluation.subsets import Subset, subsets

FINETUNE_BATCH = 512  # the paper's
FINETUNED = "finetuned"  # what stands for the kind of features where the encoder itself was trained
MICRO_BATCH = 64  # images of a backward pass at once
# Best first where two reach the same: the regression has no number that was chosen on validation.
METHODS = ("logistic", "grid", "finetune")


def lowshot(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """A measurement for each label and each number of images a class."""
    found = [
        _measure(setting, encoder, field, one) for field in class_fields(setting) for one in subsets(setting, field)
    ]
    return [one for one in found if one is not None]


def _measure(setting: Setting, encoder: Encoder, field: str, subset: Subset) -> Measurement | None:
    """All processes call this; the main one gets the measurement."""
    data, began, share = setting.data, time.monotonic(), setting.share()
    classes = any_classes(setting, field)
    used = functools.reduce(np.union1d, subset.draws)  # only these are encoded: of ImageNet's 1 %, not the 99 others
    train = data.features(encoder, "train", crop_share=share, positions=used)
    validation = data.features(encoder, "validation", crop_share=share)
    rows = [np.searchsorted(used, draw) for draw in subset.draws]
    labels = classes.train[torch.from_numpy(used)]
    name = f"lowshot {field}/{subset.name}, {encoder}"
    grids = [
        _train_grid(setting, encoder, classes, train, validation, labels, draw, name=f"{name}, draw {number}")
        for number, draw in enumerate(rows)
    ]
    tuned = []
    if setting.few.finetune and encoder.build is not None:
        tuned = [
            _fine_tune(setting, encoder, classes, draw, seed=setting.seed + number, name=f"{name}, draw {number}")
            for number, draw in enumerate(subset.draws)
        ]
    if not setting.process.is_main:
        return None
    grid = _scored(grids)
    predictions = list(grids[0].every_prediction.unbind(dim=1))  # of the first draw, beside each entry of the grid
    for view, columns in encoder.views.items():
        fit = _logistic(setting, classes, train[:, columns], validation[:, columns], labels, rows)
        point = {"features": view, "method": "logistic", "l2": fit.l2[0]}
        predictions.append(fit.predictions)
        grid.append(point | _mean_and_deviation(fit.accuracies))
    if tuned:
        predictions.append(tuned[0].predictions)
        accuracies = [next(reversed(one.accuracy.values())) for one in tuned]
        grid.append({"features": FINETUNED, "method": "finetune"} | _mean_and_deviation(accuracies))
    order = sorted(range(len(grid)), key=lambda k: METHODS.index(grid[k]["method"]))
    grid, predictions = [grid[k] for k in order], [predictions[k] for k in order]
    best = best_of(grid)
    recipe = _recipe(setting)
    extra = {
        "images": [len(draw) for draw in subset.draws],
        "images_of_each_class": None if subset.name == "list" else int(subset.name),
        "split_list": setting.few.split_list,
        "draws": len(subset.draws),
        "best_method": best["method"],
        "methods": {
            method: best_of([point for point in grid if point["method"] == method])
            for method in dict.fromkeys(point["method"] for point in grid)
        },
        "finetuning": dataclasses.asdict(recipe) | {"batch": _batch(setting, len(subset.draws[0]))} if tuned else None,
        "class_names": classes.names if classes.num_classes <= 100 else None,
    }
    found = measurement(
        setting,
        "lowshot",
        f"{field}/{subset.name}",
        grid,
        began,
        extra=extra,
        confusion=confusion_matrix(classes, predictions[grid.index(best)]),  # of the first draw
    )
    return dataclasses.replace(found, train_images=len(subset.draws[0]))


def _train_grid(
    setting: Setting,
    encoder: Encoder,
    classes: Classes,
    train: Tensor,
    validation: Tensor,
    labels: Tensor,
    draw: np.ndarray,
    *,
    name: str,
) -> TrainedHeads:
    """The linear protocol's heads on cached features of one draw."""
    chosen = torch.from_numpy(draw)
    return train_heads(
        CachedFeatures(train[chosen], None, seed=setting.seed, device=setting.process.device),
        validation,
        Classes(labels[chosen], classes.validation, classes.names),
        encoder,
        setting.adapt(LINEAR, len(draw)),
        process=setting.process,
        seed=setting.seed,
        say=setting.progress(name),
    )


def _logistic(
    setting: Setting,
    classes: Classes,
    train: Tensor,
    validation: Tensor,
    labels: Tensor,
    rows: list[np.ndarray],
) -> LowShot:
    return low_shot(
        train.to(setting.process.device),
        labels,
        validation,
        classes.validation.to(setting.process.device),
        subsets=rows,
        num_classes=classes.num_classes,
    )


def _fine_tune(setting: Setting, encoder: Encoder, classes: Classes, draw: np.ndarray, *, seed: int, name: str):
    """The whole encoder, from its weights in float32, on augmented images of one draw."""
    batch = _batch(setting, len(draw))
    setting.check_batch(batch)
    labels = classes.train[torch.from_numpy(draw)]
    prepare = normalized(setting)
    batches = AugmentedBatches(
        setting.data, augmented_loader(setting), draw, labels, batch=batch, seed=seed, prepare=prepare
    )
    recipe = _recipe(setting)
    return fine_tune(
        encoder.build(),
        batches=batches,
        validation=lambda: validation_batches(
            setting.data, classes.validation, crop_share=setting.share(), prepare=prepare
        ),
        steps_per_epoch=batches.steps,
        num_classes=classes.num_classes,
        process=setting.process,
        recipe=recipe,
        micro_batch=min(MICRO_BATCH, setting.data.micro_batch),
        validate_epochs=recipe.epochs,  # nothing is chosen by it, and validation is often the larger part
        seed=seed,
        say=setting.progress(name),
    )


def _recipe(setting: Setting) -> FineTuneRecipe:
    recipe = FineTuneRecipe()
    epochs = setting.epochs or recipe.epochs
    return dataclasses.replace(
        recipe,
        epochs=epochs,
        warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs,
        lr=setting.few.finetune_lr or recipe.lr,
    )


def _batch(setting: Setting, num_images: int) -> int:
    return min(setting.batch or FINETUNE_BATCH, num_images)


def _scored(grids: list[TrainedHeads]) -> list[dict]:
    """Every head with its mean over the draws."""
    points = zip(*(one.grid for one in grids), strict=True)
    return [
        {"features": heads[0]["features"], "method": "grid"}
        | {key: heads[0][key] for key in ("norm", "lr", "weight_decay")}
        | _mean_and_deviation([head["value"] for head in heads])
        for heads in points
    ]


def _mean_and_deviation(values: list[float]) -> dict:
    return {
        "value": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }
