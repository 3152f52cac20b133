"""kNN accuracy of the target encoder during pretraining, where the data has integer labels.

It reads files of its own order and draws no random number, so the training's data stream is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.features import extract_features, spread_samples
from ijepa_ds.evaluation.knn import knn_accuracy
from ijepa_ds.loader import EvaluationLoader, inspect_dataset, integer_label_fields
from ijepa_ds.target_encoder import TargetEncoder

NEIGHBOURS = 20


class OnlineKNN:
    """Every ``monitor.knn_epochs``: neighbours in the training images, queries in ``data.validation``."""

    def __init__(self, config: Config, process: Process):
        self.config, self.process = config, process
        self._loaders: tuple[EvaluationLoader, EvaluationLoader] | None = None
        data = config.ijepa.data
        self.fields: tuple[str, ...] = ()
        if config.ijepa.monitor.knn_epochs and data.validation:
            fields = [integer_label_fields(inspect_dataset(path)) for path in (data.train, data.validation)]
            self.fields = tuple(name for name in fields[0] if name in fields[1])

    def due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        """Whether an accuracy is due after ``step`` steps; before the first one the encoder is random: the baseline."""
        every = max(1, round(self.config.ijepa.monitor.knn_epochs * steps_per_epoch))
        return bool(self.fields) and (step % every == 0 or step == 1 or last)

    def accuracy(self, target_encoder: TargetEncoder, to_input: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``knn/FIELD`` in percent at k = 20, of features averaged over patches. All ranks call this together."""
        monitor = self.config.ijepa.monitor
        limits = (monitor.knn_train_images, monitor.knn_validation_images)
        features = [
            extract_features(
                lambda images: target_encoder.features(to_input(images)).float().mean(1),
                loader,
                spread_samples(loader.dataset.num_samples, limit),
                self.process,
            )
            for loader, limit in zip(self._open(), limits, strict=True)
        ]
        train, validation = features
        return {
            f"knn/{name}": knn_accuracy(
                train.values, train.labels[name], validation.values, validation.labels[name], ks=(NEIGHBOURS,)
            )[NEIGHBOURS]
            for name in self.fields
        }

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
