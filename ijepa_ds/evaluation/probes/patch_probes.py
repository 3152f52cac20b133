"""Probes of patches, fitted on a part of them: what class a patch is of, and how far away it is.

Shapes: P fitted patches, q others, N patches of an image, F features of a patch, C classes that the fitted ones have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.evaluation.features import spread_samples
from ijepa_ds.evaluation.probes.knn import nearest_neighbours, votes, weights_of
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.patch_scores import held_out_images
from ijepa_ds.evaluation.probes.ridge import fit_ridge
from ijepa_ds.evaluation.probes.standardise import standardise
from ijepa_ds.evaluation.results import Head

SEGMENTATION, DEPTH = "segmentation", "depth"  # what is asked, the labels of the results
BANK = 16384  # of the fitted patches, among which neighbours are sought
NEIGHBOURS = 20


@dataclass(frozen=True)
class Truth:
    """What is known of the fitted patches."""

    classes: Tensor | None  # int64 [P], numbered among ``present``
    present: Tensor  # the classes that these patches have, ascending, int64 [C]
    depth: Tensor | None  # fp32 [P]
    images: np.ndarray  # which image each is of, [P]
    places: np.ndarray  # and which of its patches, [P]


@dataclass(frozen=True)
class Probe:
    """Something fitted that tells class scores [q, C] and depth [q] of patches [q, F], whichever the folder has."""

    method: str  # "linear", "knn" or "position"
    heads: dict[str, Head]  # by label
    predict: Callable[[Tensor], dict[str, Tensor]]


def fit_linear(
    view: str, columns: slice, rows: Tensor, truth: Truth, *, seed: int, tick: Callable[[], object]
) -> Probe:
    """Logistic regression of a patch's most frequent class, ridge regression of its depth, on standardised features."""
    space = standardise(rows[:, columns])
    heads, classifier, regressor = dict[str, Head](), None, None
    if truth.classes is not None:
        part = torch.from_numpy(held_out_images(truth.images, truth.classes.cpu().numpy(), seed=seed)).to(rows.device)
        held_out = [part] if part.any() else []
        classifier = logistic_regression(space, truth.classes, held_out=held_out, tick=tick)
        heads[SEGMENTATION] = {"features": view, "l2": classifier.l2}
    if truth.depth is not None:
        regressor = fit_ridge(space, truth.depth)
        heads[DEPTH] = {"features": view, "l2": regressor.l2}

    def predict(patches: Tensor) -> dict[str, Tensor]:
        patches = space.apply(patches[:, columns])
        scores = {} if classifier is None else {SEGMENTATION: classifier.logits(patches)}
        return scores if regressor is None else scores | {DEPTH: regressor.predict(patches)}

    return Probe("linear", heads, predict)


def fit_neighbours(view: str, columns: slice, rows: Tensor, truth: Truth) -> Probe:
    """The weighted vote of the nearest fitted patches, and the weighted mean of their depths."""
    bank = torch.from_numpy(spread_samples(len(rows), BANK)).to(rows.device)
    rows, k = rows[bank, columns], min(NEIGHBOURS, len(bank))
    classes = None if truth.classes is None else truth.classes[bank]
    depth = None if truth.depth is None else truth.depth[bank]

    def predict(patches: Tensor) -> dict[str, Tensor]:
        cosine, index = nearest_neighbours(rows, patches[:, columns], k=k)
        weights, told = weights_of(cosine), {}
        weights = weights / weights.sum(dim=1, keepdim=True)
        if classes is not None:
            told[SEGMENTATION] = votes(weights, classes[index], len(truth.present))
        if depth is not None:
            told[DEPTH] = (weights * depth[index]).sum(dim=1)
        return told

    labels = [SEGMENTATION] * (classes is not None) + [DEPTH] * (depth is not None)
    return Probe("knn", {label: {"features": view, "k": k} for label in labels}, predict)


def by_position(truth: Truth, number: int) -> Probe:
    """What a patch's place among the ``number`` of an image alone tells: how often each class is there, the mean depth.

    Tokens hold their positions, so what is above this is what an encoder knows of the image.
    """
    told = dict[str, Tensor]()
    if truth.classes is not None:
        classes, count = truth.classes.cpu(), len(truth.present)
        counts = torch.bincount(torch.from_numpy(truth.places) * count + classes, minlength=number * count)
        shares = torch.bincount(classes, minlength=count) / len(classes)
        scores = counts.view(number, count) + 1e-3 * shares
        told[SEGMENTATION] = scores / scores.sum(dim=1, keepdim=True)
    if truth.depth is not None:
        depth, places = truth.depth.double().cpu().numpy(), truth.places
        sums, counts_of = np.bincount(places, depth, number), np.bincount(places, minlength=number)
        means = np.where(counts_of > 0, sums / np.maximum(counts_of, 1), depth.mean())
        told[DEPTH] = torch.from_numpy(means).float()
    device = truth.present.device
    told = {label: values.to(device) for label, values in told.items()}
    heads = {label: {"features": "position"} for label in told}
    return Probe("position", heads, lambda patches: {
        label: values.repeat(len(patches) // number, *[1] * (values.ndim - 1)) for label, values in told.items()
    })  # fmt: skip
