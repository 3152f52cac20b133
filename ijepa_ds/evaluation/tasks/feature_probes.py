"""Tasks on features that are extracted once: logistic regression and nearest neighbours.

Shapes: n training, m validation images, F features.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.data import SPLITS
from ijepa_ds.evaluation.features import spread_samples
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.knn import NEIGHBOURS, nearest_neighbours, usable, vote
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.ridge import ridge_regression
from ijepa_ds.evaluation.probes.standardise import held_out_part, standardise
from ijepa_ds.evaluation.results import Head, Measurement
from ijepa_ds.evaluation.setting import Setting

QUERIES, SHOWN_NEIGHBOURS = 8, 6
KEPT_PAIRS = 2000  # of true and predicted values


def logistic(setting: Setting, candidate: Candidate, classes: dict[str, Classes]) -> Iterator[Measurement]:
    """Logistic regression on standardised features, the penalty chosen on a part of train.

    Of a continuous label on its bins, beside ridge regression.
    """
    train, validation = (setting.features(candidate, split) for split in SPLITS)
    if not setting.process.is_main:
        return
    began, labels = time.monotonic(), {field: of_label.train for field, of_label in classes.items()}
    work = f"logistic regression, {candidate}"
    fits = logistic_heads(setting, candidate, train, validation, labels, held_out=_one_part, work=work)
    for field, scored in fits.items():
        continuous = setting.data.labels(field)[0].is_floating_point()
        extra = regressed(setting, candidate, field, train, validation) if continuous else None
        yield setting.measurement("logistic", field, classes[field], *scored, began, extra=extra)


def _one_part(labels: Tensor) -> list[Tensor]:
    return [held_out_part(labels, seed=0)]


def logistic_heads(
    setting: Setting,
    candidate: Candidate,
    train: Tensor,
    validation: Tensor,
    labels: dict[str, Tensor],
    *,
    held_out: Callable[[Tensor], list[Tensor]],
    work: str,
) -> dict[str, tuple[list[Head], list[Tensor]]]:
    """Logistic regression of each of ``labels`` [n] on each view of train [n, F].

    Each view is standardised once, for all labels.

    Returns:
        For each label the heads, one a view, and the classes [m] that each gives validation [m, F].
    """
    device, done = setting.process.device, 0
    fits: dict[str, tuple[list[Head], list[Tensor]]] = {field: ([], []) for field in labels}
    progress = setting.progress(work, len(candidate.views) * len(labels), "fits")
    for view, columns in candidate.views.items() if setting.process.is_main else ():
        space = standardise(train[:, columns].to(device))
        rows = space.apply(validation[:, columns].to(device))
        for field, (heads, predictions) in fits.items():
            targets, tick = labels[field].to(device), functools.partial(progress.show, done, field)
            fit = logistic_regression(space, targets, held_out=held_out(targets), tick=tick)
            heads.append({"features": view, "l2": fit.l2})
            predictions.append(fit.logits(rows).argmax(dim=1))
            done += 1
    progress.end(done)
    return fits


def regressed(setting: Setting, candidate: Candidate, field: str, train: Tensor, validation: Tensor) -> dict[str, Any]:
    """Ridge regression of the raw labels on each view: the lowest mean absolute error, and some of its predictions."""
    train_values, values = (part.double() for part in setting.data.labels(field))
    errors: dict[str, float] = {}
    predictions: dict[str, Tensor] = {}
    for view, columns in candidate.views.items():
        space = standardise(train[:, columns].double())
        _, predictions[view] = ridge_regression(space, train_values, space.apply(validation[:, columns].double()))
        errors[view] = float((predictions[view] - values).abs().mean())
    best = min(errors, key=errors.__getitem__)
    kept = torch.from_numpy(spread_samples(len(values), KEPT_PAIRS))
    return {
        "mean_absolute_error": errors[best],
        "mean_absolute_error_by_features": errors,
        "true_values": [round(value, 4) for value in values[kept].tolist()],
        "predicted_values": [round(value, 4) for value in predictions[best][kept].tolist()],
    }


def knn(setting: Setting, candidate: Candidate, classes: dict[str, Classes]) -> Iterator[Measurement]:
    """Weighted nearest neighbours, k = 10, 20, 100, 200, temperature 0.07."""
    train, validation = (setting.features(candidate, split) for split in SPLITS)
    if not setting.process.is_main:
        return
    began, device, samples = time.monotonic(), setting.process.device, setting.data.samples
    ks, found = usable(NEIGHBOURS, len(train), setting.say), {}
    for view, columns in candidate.views.items():
        progress = setting.progress(f"nearest neighbours, {view}, {candidate}", len(validation))
        bank = train[:, columns].to(device)
        found[view] = nearest_neighbours(bank, validation[:, columns], k=ks[-1], tick=progress.show)
        progress.end(len(validation))
    queries = spread_samples(len(validation), QUERIES)
    nearest = found[view][1][queries, :SHOWN_NEIGHBOURS].cpu().numpy()  # by the last view: all columns
    rows = zip(samples["validation"][queries].tolist(), samples["train"][nearest].tolist(), strict=True)
    extra = {"neighbours": [{"query": query, "train": row} for query, row in rows]}  # sample numbers in the two files
    heads = [{"features": view, "k": k} for view in found for k in ks]
    for field, of_label in classes.items():
        labels = of_label.train.to(device)
        predictions = [vote(cosine, labels[index], k=k) for cosine, index in found.values() for k in ks]
        measurement = setting.measurement("knn", field, of_label, heads, predictions, began, extra=extra)
        yield dataclasses.replace(measurement, confusion=None)
