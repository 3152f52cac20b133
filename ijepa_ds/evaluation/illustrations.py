"""The pictures beside a results.json, and the same in TensorBoard. Results never depend on them."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from pathlib import Path

import numpy as np
import torch

from ijepa_ds.evaluation.results import Results, TaskResult
from ijepa_ds.evaluation.setting import Setting, any_classes


def illustrate(results: Results, folder: Path, setting: Setting, *, step: int) -> list[Path]:
    """Draw into ``folder``/pictures and into TensorBoard; what fails is said in a line, and the rest is drawn.

    The main process calls this, alone.
    """
    places: list[Path] = []

    def warn(line: str) -> None:
        print(f"warning: {line}", flush=True)

    try:
        from ijepa_ds.evaluation.plots import Regression, draw_results  # a second to import

        regressions = [
            Regression(
                task.label if task.label == task.task else f"{task.label}, {task.task}",
                np.array(task.extra["true_values"]),
                np.array(task.extra["predicted_values"]),
            )
            for task in results.tasks
            if "true_values" in task.extra
        ]
        places = draw_results(
            dataclasses.asdict(results),
            folder / "pictures",
            neighbours=_neighbours(results, setting),
            regression=regressions,
            warn=warn,
        )
        if places:
            print(f"pictures in {folder / 'pictures'}: {', '.join(path.name for path in places)}", flush=True)
            _log_pictures(places, folder / "tensorboard" / "trained", step)
    except Exception as error:  # results.json is there: whatever this is, the evaluation has succeeded
        warn(f"pictures are missing: {error!r}")
    return places


def _neighbours(results: Results, setting: Setting):
    """The nearest training images that the first kNN found, with their classes; None without a kNN."""
    from ijepa_ds.evaluation.plots import SHOWN_NEIGHBOURS, Neighbours

    # They depend on the features alone; classes say more than the bins of a continuous label.
    tasks = sorted(
        (task for task in results.tasks if task.task == "knn"),
        key=lambda task: task.label not in setting.data.integer_fields,
    )
    if not tasks:
        return None
    task: TaskResult = tasks[0]
    found, classes, data = task.extra["neighbours"], any_classes(setting, task.label), setting.data
    queries = np.unique([one["query"] for one in found])  # of few images the same may have been taken twice
    near_of = {one["query"]: one["train"][:SHOWN_NEIGHBOURS] for one in found}
    near = np.array([near_of[query] for query in queries])  # [Q, K]

    def images_of(split: str, samples: np.ndarray) -> np.ndarray:
        batches = data.images(split, samples, crop_share=setting.share())
        return torch.cat([images.cpu().clone() for images in batches]).numpy()

    def names_of(split: str, labels: torch.Tensor, samples: np.ndarray) -> list[str]:
        return [classes.names[int(labels[place])] for place in np.searchsorted(data.samples[split], samples)]

    near_names = np.array(names_of("train", classes.train, near.reshape(-1)), object).reshape(near.shape)
    return Neighbours(
        images_of("validation", queries),
        names_of("validation", classes.validation, queries),
        images_of("train", near.reshape(-1)).reshape(*near.shape, *data.image_size, 3),
        near_names.tolist(),
    )


def _log_pictures(paths: list[Path], folder: Path, step: int) -> None:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.closing(SummaryWriter(str(folder))) as writer:
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            writer.add_image(f"evaluation/{path.stem}", pixels, step, dataformats="HWC")


def log_scalars(folder: Path, step: int, results: Results) -> None:
    """TensorBoard's scalars, in a folder of their own so that they do not mix with the training's."""
    from torch.utils.tensorboard import SummaryWriter

    for name in ("trained", "random", "pixels"):
        with contextlib.closing(SummaryWriter(str(folder / "tensorboard" / name))) as writer:
            for task in results.tasks:
                values = [task.value] if name == "trained" else task.baselines[name]["values"]
                tag = f"evaluation/{task.task}/{task.label}"
                writer.add_scalar(tag, statistics.mean(values), step)
                if "mean_absolute_error" in task.extra:
                    found = task.extra if name == "trained" else task.baselines[name]
                    errors = found["mean_absolute_error"]
                    errors = errors if isinstance(errors, list) else [errors]
                    writer.add_scalar(f"{tag}/mean_absolute_error", statistics.mean(errors), step)
