"""Task ``lowshot``: a few labelled images, by logistic regression, by the linear grid of heads and by fine-tuning.

The best of the three is reported, and which it was, as in the paper (I-JEPA, appendix A.2); of several draws the mean.

Shapes: n training images in use, m of validation, F features.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.inputs import AugmentedInputs, CachedFeatures, validation_batches
from ijepa_ds.evaluation.labels import Classes, confusion_matrix
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune
from ijepa_ds.evaluation.probes.head_training import train_heads
from ijepa_ds.evaluation.probes.logistic import low_shot
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
    rows = [(field, subset) for field in class_fields(setting) for subset in subsets(setting, field)]
    measured = [_measure(setting, encoder, field, subset) for field, subset in rows]
    return [measurement for measurement in measured if measurement is not None]


def _measure(setting: Setting, encoder: Encoder, field: str, subset: Subset) -> Measurement | None:
    """All processes call this; the main one gets the measurement."""
    began = time.monotonic()
    classes = any_classes(setting, field)
    name = f"lowshot {field}/{subset.name}, {encoder}"
    used = functools.reduce(np.union1d, subset.draws)  # only these are encoded: of ImageNet's 1 %, not the 99 others
    train = setting.data.features(encoder, "train", crop_share=setting.share(), positions=used)
    validation = setting.data.features(encoder, "validation", crop_share=setting.share())
    few = Few(classes.train[torch.from_numpy(used)], [np.searchsorted(used, draw) for draw in subset.draws])
    entries = _grid(setting, encoder, classes, few, (train, validation), name)
    if setting.few.finetune and encoder.build is not None:
        entries += [_fine_tuned(setting, encoder, classes, subset, name)]
    if not setting.process.is_main:
        return None
    entries += _logistic(setting, encoder, classes, few, (train, validation))
    entries.sort(key=lambda entry: METHODS.index(entry.point["method"]))
    grid = [entry.point for entry in entries]
    best = best_of(grid)
    tuned = any(point["method"] == "finetune" for point in grid)
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
        "finetuning": asdict(_recipe(setting)) | {"batch": _batch(setting, len(subset.draws[0]))} if tuned else None,
        "class_names": classes.names if classes.num_classes <= 100 else None,
    }
    confusion = confusion_matrix(classes, entries[grid.index(best)].predictions)
    result = measurement(setting, "lowshot", f"{field}/{subset.name}", grid, began, extra=extra, confusion=confusion)
    return replace(result, train_images=len(subset.draws[0]))


@dataclass(frozen=True)
class Few:
    """The images of all draws: their labels [u], and which of them each draw takes."""

    labels: Tensor
    draws: list[np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One line of the results, over all draws; ``predictions`` [m] of the first draw."""

    point: dict[str, Any]
    predictions: Tensor


def _grid(
    setting: Setting, encoder: Encoder, classes: Classes, few: Few, features: tuple[Tensor, Tensor], name: str
) -> list[Entry]:
    """The linear protocol's heads on cached features."""
    trained = [
        train_heads(
            CachedFeatures(features[0][rows], None, seed=setting.seed, device=setting.process.device),
            features[1],
            Classes(few.labels[rows], classes.validation, classes.names),
            encoder,
            setting.adapt(LINEAR, len(rows)),
            process=setting.process,
            seed=setting.seed,
            say=setting.progress(f"{name}, draw {draw}"),
        )
        for draw, rows in enumerate(map(torch.from_numpy, few.draws))
    ]
    heads = zip(*(draw.grid for draw in trained), strict=True)  # each head's values over the draws
    return [
        Entry(
            {"features": head[0]["features"], "method": "grid"}
            | {key: head[0][key] for key in ("norm", "lr", "weight_decay")}
            | _mean_and_deviation([draw["value"] for draw in head]),
            predictions,
        )
        for head, predictions in zip(heads, trained[0].every_prediction.unbind(dim=1), strict=True)
    ]


def _logistic(
    setting: Setting, encoder: Encoder, classes: Classes, few: Few, features: tuple[Tensor, Tensor]
) -> list[Entry]:
    device, entries = setting.process.device, []
    for view, columns in encoder.views.items():
        fit = low_shot(
            features[0][:, columns].to(device),
            few.labels,
            features[1][:, columns],
            classes.validation.to(device),
            subsets=few.draws,
            num_classes=classes.num_classes,
        )
        point = {"features": view, "method": "logistic", "l2": fit.l2[0]} | _mean_and_deviation(fit.accuracies)
        entries.append(Entry(point, fit.predictions))
    return entries


def _fine_tuned(setting: Setting, encoder: Encoder, classes: Classes, subset: Subset, name: str) -> Entry:
    """The whole encoder, from its weights in float32, on augmented images of each draw."""
    assert encoder.build is not None
    data, prepare = setting.data, normalized(setting)
    predictions, accuracies = [], []
    for draw, positions in enumerate(subset.draws):
        batch, seed = _batch(setting, len(positions)), setting.seed + draw
        setting.check_batch(batch)
        inputs = AugmentedInputs(
            augmented_loader(setting),
            data.samples["train"][positions],
            classes.train[torch.from_numpy(positions)],
            batch=batch,
            seed=seed,
            process=setting.process,
            prepare=prepare,
        )
        predicted, labels = fine_tune(
            encoder.build(),
            inputs,
            lambda: validation_batches(data, classes.validation, setting.share(), prepare=prepare),
            num_classes=classes.num_classes,
            process=setting.process,
            recipe=_recipe(setting),
            micro_batch=min(MICRO_BATCH, data.micro_batch),
            seed=seed,
            name=f"fine-tuning, {name}, draw {draw}",
        )
        predictions.append(predicted)
        accuracies.append(100.0 * float((predicted == labels).float().mean()))
    return Entry({"features": FINETUNED, "method": "finetune"} | _mean_and_deviation(accuracies), predictions[0])


def _recipe(setting: Setting) -> FineTuneRecipe:
    recipe = FineTuneRecipe()
    epochs, lr = setting.epochs or recipe.epochs, setting.few.finetune_lr or recipe.lr
    return replace(recipe, epochs=epochs, warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs, lr=lr)


def _batch(setting: Setting, num_images: int) -> int:
    return min(setting.batch or FINETUNE_BATCH, num_images)


def _mean_and_deviation(values: list[float]) -> dict[str, Any]:
    return {
        "value": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }
