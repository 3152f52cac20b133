"""An online probe of the target encoder during pretraining: kNN and a least-squares classifier, for integer labels.

It reads files of its own order and draws no random number, so the training's data stream is not disturbed.

Shapes: n training, m validation images, B of a batch, N patches, D encoder width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.data.beton import inspect_dataset, integer_label_fields, read_labels
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import some
from ijepa_ds.evaluation.features import BrokenFeaturesError, extract_features, spread_samples
from ijepa_ds.evaluation.probes.knn import nearest_neighbours, usable, vote
from ijepa_ds.evaluation.probes.ridge import least_squares_predictions

NEIGHBOURS, MICRO_BATCH = 20, 256


class OnlineProbe:
    """Every ``monitor.knn_epochs``: fitted on some training images, measured on ``data.validation``."""

    def __init__(self, config: Config, process: Process, say: Callable[[str], None] = print) -> None:
        self.config, self.process = config.ijepa, process
        self.say_once = functools.cache(say)
        self._loaders: list[ImageLoader] = []
        data, monitor = config.ijepa.data, config.ijepa.monitor
        self.fields: list[str] = []
        if monitor.knn_epochs and data.validation:
            self._datasets = train, validation = inspect_dataset(data.train), inspect_dataset(data.validation)
            limits = monitor.knn_train_images, monitor.knn_validation_images
            self._samples = list(map(spread_samples, (train.num_samples, validation.num_samples), limits))
            self.fields = [name for name in integer_label_fields(train) if name in integer_label_fields(validation)]

    def due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        """Whether an accuracy is due after ``step`` steps; before the first one the encoder is random: the baseline."""
        every = max(1, round(self.config.monitor.knn_epochs * steps_per_epoch))
        return bool(self.fields) and (step % every == 0 or step == 1 or last)

    def accuracy(self, features: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``knn/FIELD`` (k = 20) and ``linear/FIELD`` in percent, of features averaged over patches; on the main rank.

        ``features`` maps uint8 images [B, H, W, 3] on the device to the target encoder's [B, N, D]. All ranks call this
        together. What cannot be measured is said once and left out: a run goes on without it.
        """
        if not self._loaders:  # compiling them takes seconds
            size, workers = self.config.data.image_size, self.config.data.workers
            self._loaders = [
                ImageLoader(dataset, image_size=size, batch_size=MICRO_BATCH, num_workers=workers)
                for dataset in self._datasets
            ]

        def pooled(images: Tensor) -> Tensor:
            return features(images).float().mean(1)

        pairs = zip(self._loaders, self._samples, strict=True)
        try:
            rows = [extract_features(pooled, loader, samples, self.process) for loader, samples in pairs]
        except BrokenFeaturesError as error:
            if self.process.is_main:
                self.say_once(f"the online probe is left out: {error}")
            return {}
        accuracies: dict[str, float] = {}
        for field in self.fields if self.process.is_main else ():
            used = zip(self._datasets, self._samples, strict=True)
            labels = [torch.from_numpy(read_labels(dataset, field)[samples]) for dataset, samples in used]
            accuracies |= probe(rows, labels, field, self.say_once)
        return accuracies


def probe(rows: list[Tensor], labels: list[Tensor], field: str, say: Callable[[str], None]) -> dict[str, float]:
    """Both accuracies in percent, of features [n, D] and [m, D]; an image of a class that train lacks is an error."""
    classes, train_labels = torch.unique(labels[0], return_inverse=True)
    known = torch.isin(labels[1], classes)
    if not known.all():
        missing = f"{field} {some(sorted(set(labels[1][~known].tolist())))}"
        cure = "no training image in use has it; raise ijepa.monitor.knn_train_images"
        say(f"the online probe counts images of {missing} as errors: {cure}")
    if len(classes) < 2:
        return {}
    (k,) = usable([NEIGHBOURS], len(rows[0]), say)
    cosine, index = nearest_neighbours(*rows, k=k)
    predictions = {
        f"knn/{field}": vote(cosine, train_labels[index], k=k),
        f"linear/{field}": least_squares_predictions(rows[0], train_labels, rows[1]),
    }
    return {name: 100.0 * float((classes[given] == labels[1]).double().mean()) for name, given in predictions.items()}
