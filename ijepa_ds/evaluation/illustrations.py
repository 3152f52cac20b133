"""The pictures beside a results.json, and the same in TensorBoard. Results never depend on them."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ijepa_ds.evaluation.results import Results, TaskResult
from ijepa_ds.evaluation.setting import Setting, any_classes

if TYPE_CHECKING:
    from ijepa_ds.evaluation.plots import Labelled


def illustrate(results: Results, folder: Path, setting: Setting, *, step: int) -> list[Path]:
    """Draw into ``folder``/pictures and into TensorBoard; what fails is said in a line, and the rest is drawn.

    The main process calls this, alone.
    """
    pictures: list[Path] = []
    try:
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter

        from ijepa_ds.evaluation.plots import draw_results  # a second to import

        tasks = [task for task in results.tasks if task.task == "knn"]
        neighbours = functools.partial(_neighbours, tasks, setting) if tasks else None
        pictures = draw_results(results, folder / "pictures", neighbours=neighbours, examples=setting.examples)
        if pictures:
            print(f"pictures in {folder / 'pictures'}: {', '.join(path.name for path in pictures)}", flush=True)
            with SummaryWriter(str(folder / "tensorboard" / "trained")) as writer:
                for path in pictures:
                    pixels = np.asarray(Image.open(path).convert("RGB"))
                    writer.add_image(f"evaluation/{path.stem}", pixels, step, dataformats="HWC")
    except Exception as error:  # results.json is there: whatever this is, the evaluation has succeeded
        print(f"warning: pictures are missing: {error!r}", flush=True)
    return pictures


def _neighbours(tasks: list[TaskResult], setting: Setting) -> list[list[Labelled]]:
    """A few queries, each with its nearest training images, as kNN on one or several labels measured them."""
    data = setting.data
    # They depend on the features alone; classes say more than the bins of a continuous label.
    task = min(tasks, key=lambda task: task.label not in data.integer_fields)
    classes = any_classes(setting, task.label)

    def labelled(split: str, labels: Tensor, samples: list[int]) -> list[Labelled]:
        loader = data.loader(split, crop_share=setting.share())
        images = [image.numpy().copy() for batch in loader.batches(np.array(samples)) for image in batch]
        names = [classes.names[int(labels[place])] for place in np.searchsorted(data.samples[split], samples)]
        return list(zip(images, names, strict=True))

    nearest = {row["query"]: row["train"] for row in task.extra["neighbours"]}
    queries = labelled("validation", classes.validation, sorted(nearest))
    rows = zip(queries, sorted(nearest), strict=True)
    return [[query, *labelled("train", classes.train, nearest[sample])] for query, sample in rows]


def log_scalars(folder: Path, step: int, results: Results) -> None:
    """TensorBoard's scalars, in a folder of their own so that they do not mix with the training's."""
    from torch.utils.tensorboard import SummaryWriter

    for name in ("trained", "random", "pixels"):
        with SummaryWriter(str(folder / "tensorboard" / name)) as writer:
            for task in results.tasks:
                tag = f"evaluation/{task.task}/{task.label}"
                writer.add_scalar(tag, task.value if name == "trained" else task.baseline(name)[0], step)
                if (error := task.extra.get("mean_absolute_error")) is not None:
                    errors = [error] if name == "trained" else task.baselines[name]["mean_absolute_error"]
                    writer.add_scalar(f"{tag}/mean_absolute_error", statistics.mean(errors), step)
