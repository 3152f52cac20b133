"""An online probe of the target encoder during pretraining: kNN and a least-squares classifier, for integer labels.

It reads files of its own order and draws no random number, so the training's data stream is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.data.beton import inspect_dataset, integer_label_fields
from ijepa_ds.data.image_loader import EvaluationLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.features import Features, extract_features, spread_samples
from ijepa_ds.evaluation.probes.knn import knn_accuracy
from ijepa_ds.evaluation.probes.ridge import least_squares_accuracy

NEIGHBOURS = 20


class OnlineProbe:
    """Every ``monitor.knn_epochs``: fitted on some training images, measured on ``data.validation``."""

    def __init__(self, config: Config, process: Process, say: Callable[[str], None] = print):
        self.config, self.process, self.say = config, process, say
        self._loaders: tuple[EvaluationLoader, EvaluationLoader] | None = None
        self._said: set[str] = set()
        data = config.ijepa.data
        self.fields: tuple[str, ...] = ()
        if config.ijepa.monitor.knn_epochs and data.validation:
            fields = [integer_label_fields(inspect_dataset(path)) for path in (data.train, data.validation)]
            self.fields = tuple(name for name in fields[0] if name in fields[1])

    def due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        """Whether an accuracy is due after ``step`` steps; before the first one the encoder is random: the baseline."""
        every = max(1, round(self.config.ijepa.monitor.knn_epochs * steps_per_epoch))
        return bool(self.fields) and (step % every == 0 or step == 1 or last)

    def accuracy(self, features: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``knn/FIELD`` (k = 20) and ``linear/FIELD`` in percent, of features averaged over patches; on the main rank.

        All ranks call this together. What cannot be measured is said once and left out: a run goes on without it.
        """
        monitor = self.config.ijepa.monitor
        limits = (monitor.knn_train_images, monitor.knn_validation_images)
        train, validation = (
            extract_features(
                lambda images: features(images).float().mean(1),
                loader,
                spread_samples(loader.dataset.num_samples, limit),
                self.process,
            )
            for loader, limit in zip(self._open(), limits, strict=True)
        )
        found: dict[str, float] = {}
        for name in self.fields if self.process.is_main else ():
            try:
                found |= probe(train, validation, name, self._say_once)
            except UserError as error:  # such as features that are not finite
                self._say_once(f"the online probe of {name} is left out: {error}")
        return found

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def _open(self) -> tuple[EvaluationLoader, EvaluationLoader]:
        if self._loaders is None:
            data = self.config.ijepa.data
            self._loaders = tuple(
                EvaluationLoader(
                    inspect_dataset(path),
                    image_size=data.image_size,
                    batch_size=256,
                    num_workers=data.workers,
                    label_fields=self.fields,
                )
                for path in (data.train, data.validation)
            )
        return self._loaders


def probe(train: Features, validation: Features, field: str, say: Callable[[str], None]) -> dict[str, float]:
    """Both accuracies in percent. An image of a class that train does not show counts as an error."""
    classes, train_labels = torch.unique(train.labels[field], return_inverse=True)
    known = torch.isin(validation.labels[field], classes)
    if not known.all():
        missing = sorted(set(validation.labels[field][~known].tolist()))
        say(
            f"the online probe counts images of {field} {', '.join(map(str, missing[:8]))} as errors: no training "
            "image in use has it; raise ijepa.monitor.knn_train_images"
        )
    if not known.any() or len(classes) < 2:
        return {f"knn/{field}": 0.0, f"linear/{field}": 0.0} if not known.any() else {}
    values, labels = validation.values[known], torch.searchsorted(classes, validation.labels[field][known])
    share = len(values) / len(known)
    neighbours = knn_accuracy(train.values, train_labels, values, labels, ks=(NEIGHBOURS,), say=say)
    return {
        f"knn/{field}": share * next(iter(neighbours.values())),
        f"linear/{field}": share * least_squares_accuracy(train.values, train_labels, values, labels),
    }
