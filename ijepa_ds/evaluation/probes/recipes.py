"""The recipes of the linear protocols (I-JEPA, appendix A.2): optimizer, schedule, and the grid of rates and decays."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMS = ("linear", "bn")  # a linear layer, or BatchNorm before it
BASE_BATCH = 256  # what a learning rate "per batch" counts in


@dataclass(frozen=True)
class Head:
    """One classifier of the grid. ``features`` names the columns that it sees, ``norm`` is one of :data:`NORMS`."""

    features: str
    norm: str
    lr: float  # at the start, what is really used
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """How the heads of a task are trained."""

    optimizer: str  # "lars" or "sgd" (Nesterov); momentum 0.9
    epochs: int
    batch: int
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    milestones: tuple[float, ...] | None  # epochs after which the rate is divided by 10; None: cosine to 0
    # Which rates a number of `lrs` stands for: itself, itself x batch / 256, or one head for each of the two.
    lr_scales: tuple[str, ...] = ("batch",)
    crop: bool = True  # in training, random resized; CLEVR's objects must stay in the image

    def heads(self, feature_names: tuple[str, ...]) -> list[Head]:
        """All heads of the grid."""
        scales = [self.batch / BASE_BATCH if scale == "batch" else 1.0 for scale in self.lr_scales]
        rates = sorted({lr * scale for lr, scale in itertools.product(self.lrs, scales)}, reverse=True)
        return [Head(*values) for values in itertools.product(feature_names, NORMS, rates, self.weight_decays)]

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """What the rates are multiplied by in ``step``, counted from 0."""
        if self.milestones is None:
            return 0.5 * (1 + math.cos(math.pi * step / (self.epochs * steps_per_epoch)))
        return 0.1 ** sum(step >= round(milestone * steps_per_epoch) for milestone in self.milestones)

    def adapted(
        self,
        *,
        epochs: int | None = None,
        batch: int | None = None,
        lrs: Sequence[float] | None = None,
        weight_decays: Sequence[float] | None = None,
    ) -> Recipe:
        """The recipe with other numbers, where given; the steps of the rate keep their share of the epochs."""
        epochs = epochs or self.epochs
        return dataclasses.replace(
            self,
            epochs=epochs,
            milestones=self.milestones and tuple(epoch * epochs / self.epochs for epoch in self.milestones),
            batch=batch or self.batch,
            lrs=tuple(lrs or self.lrs),
            weight_decays=tuple(weight_decays or self.weight_decays),
        )


# The protocol names the rates and not whether they grow with the batch: both readings are trained in the one pass.
LINEAR = Recipe("lars", 50, 16384, (0.05, 0.01, 0.001), (5e-4, 0.0), (15, 30, 45), lr_scales=("as given", "batch"))
COUNT = Recipe("sgd", 50, 256, (0.01,), (5e-4,), None, crop=False)
DEPTH = Recipe("sgd", 100, 256, (0.01,), (5e-4,), None, crop=False)
PRESETS = {
    "cifar100": Recipe("sgd", 28, 256, (0.01,), (5e-4,), (8, 16, 24)),
    "places205": Recipe("sgd", 14, 256, (0.01,), (5e-4,), (4, 8, 12)),
    "inat18": Recipe("sgd", 84, 256, (0.01,), (5e-4,), (24, 48, 72)),
}
