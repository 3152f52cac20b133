"""The pictures beside a results.json, and the same in TensorBoard. Results never depend on them."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ijepa_ds.evaluation.results import Results
from ijepa_ds.evaluation.setting import Setting, any_classes

if TYPE_CHECKING:
    from ijepa_ds.evaluation.plots import Neighbours


def illustrate(results: Results, folder: Path, setting: Setting, *, step: int) -> list[Path]:
    """Draw into ``folder``/pictures and into TensorBoard; what fails is said in a line, and the rest is drawn.

    The main process calls this, alone.
    """
    pictures: list[Path] = []
    try:
        from ijepa_ds.evaluation.plots import draw_results  # a second to import

        pictures = draw_results(results, folder / "pictures", neighbours=_neighbours(results, setting))
        if pictures:
            print(f"pictures in {folder / 'pictures'}: {', '.join(path.name for path in pictures)}", flush=True)
            _log_pictures(pictures, folder / "tensorboard" / "trained", step)
    except Exception as error:  # results.json is there: whatever this is, the evaluation has succeeded
        print(f"warning: pictures are missing: {error!r}", flush=True)
    return pictures


def _neighbours(results: Results, setting: Setting) -> Neighbours | None:
    """The nearest training images of a few queries, as kNN measured them, with their classes; None without a kNN."""
    from ijepa_ds.evaluation.plots import SHOWN_NEIGHBOURS, Neighbours

    data, tasks = setting.data, [task for task in results.tasks if task.task == "knn"]
    if not tasks:
        return None
    # They depend on the features alone; classes say more than the bins of a continuous label.
    task = min(tasks, key=lambda task: task.label not in data.integer_fields)
    classes = any_classes(setting, task.label)
    # Of few images the same query may have been taken twice.
    nearest = {row["query"]: row["train"][:SHOWN_NEIGHBOURS] for row in task.extra["neighbours"]}
    queries = np.array(sorted(nearest))  # [Q]
    near = np.array([nearest[query] for query in queries])  # [Q, K]

    def images_and_names(split: str, labels: torch.Tensor, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batches = data.images(split, samples, crop_share=setting.share())
        names = [classes.names[int(labels[place])] for place in np.searchsorted(data.samples[split], samples)]
        return torch.cat([images.cpu().clone() for images in batches]).numpy(), np.array(names, object)

    images, names = images_and_names("validation", classes.validation, queries)
    near_images, near_names = images_and_names("train", classes.train, near.reshape(-1))
    near_images = near_images.reshape(*near.shape, *images.shape[1:])
    return Neighbours(images, names.tolist(), near_images, near_names.reshape(near.shape).tolist())


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
                tag = f"evaluation/{task.task}/{task.label}"
                writer.add_scalar(tag, task.value if name == "trained" else task.baseline(name)[0], step)
                if (error := task.extra.get("mean_absolute_error")) is not None:
                    errors = [error] if name == "trained" else task.baselines[name]["mean_absolute_error"]
                    writer.add_scalar(f"{tag}/mean_absolute_error", statistics.mean(errors), step)
