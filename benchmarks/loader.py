"""The pretraining loader against bare FFCV, FFCV's JPEG decoder alone, and torchvision, on the same images.

    python benchmarks/loader.py --images FOLDER         # of class folders, as ImageNet's
    python benchmarks/loader.py                         # on rendered scenes

All give random resized crops of 224 px with the same bounds of area and shape, but the decoder, which stops at the
whole image. Ours draws masks too. Bare FFCV is its stock RandomResizedCropRGBImageDecoder on the same file; torchvision
is an ImageFolder of the same JPEGs with RandomResizedCrop, in a DataLoader. The sides take turns; a round's rate is
taken from the arrival of a traversal's first batch to that of its last, the ratio to bare FFCV round by round. Seconds
of processor time, of all threads, tell the cost where other work disturbs the clock (not for torchvision's processes).

Then the step across an epoch's end beside any other: the median time that a step's images took to arrive.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from ijepa_ds.data.beton import Dataset, inspect_dataset  # before ffcv: it makes importing that quick

# isort: split
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from ffcv.transforms import ToTensor

from ijepa_ds.data.crops import Crops
from ijepa_ds.data.pretraining_loader import PretrainingLoader
from ijepa_ds.method.masks import MultiblockSampler

SIZE, SCALE, RATIO = (224, 224), (0.3, 1.0), (3 / 4, 4 / 3)
GRID, CONTEXT_TOKENS = (16, 16), 72
OURS, FFCV, DECODER, TORCHVISION = "ours", "bare FFCV", "JPEG decoder alone", "torchvision"

Batches = Callable[[], Iterator[int]]  # a traversal: the images of each batch as it arrives


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure for each resolution and number of workers, print tables, return the record."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = repeated(options.images or rendered(folder, options), folder / "images", options.count)
        results = []
        for resolution in options.resolutions:
            dataset = converted(images, folder / f"{resolution}.beton", resolution)
            results += [measured(dataset, resolution, workers, options) for workers in options.workers]
            show(results[-len(options.workers) :])
    record = measure.record(results, compared=__doc__ or "", device=torch.device("cpu"))
    measure.save(record, options.json)
    return record


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Which images, in which sizes, read by how many threads."""
    parser = measure.parser(__doc__)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--images", type=Path, help="a folder of class folders (default: scenes, rendered first)")
    parser.add_argument("--count", type=int, default=1000, help="images of an epoch; fewer are repeated")
    parser.add_argument("--scenes", type=int, default=64, help="how many to render")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 400, 256], help="bounds of the longer side")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=1, help="of a round")
    parser.add_argument("--steps-epochs", type=int, default=12, help="over which the steps' times are taken")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------------------- images


def rendered(folder: Path, options: argparse.Namespace) -> Path:
    """The project's own scenes as a folder of one class."""
    command = [sys.executable, "data_prep/make_scenes.py", str(folder / "scenes"), "--val", "1"]
    command += ["--train", str(options.scenes), "--size", str(max(options.resolutions))]
    subprocess.run(command, cwd=measure.ROOT, check=True, stdout=sys.stderr)
    return folder / "scenes" / "images"


def repeated(source: Path, folder: Path, count: int) -> Path:
    """``count`` images of ``source`` in one class, repeated where there are fewer."""
    (folder / "one").mkdir(parents=True)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    for number, path in enumerate(itertools.islice(itertools.cycle(files), count)):
        shutil.copy(path, folder / "one" / f"{number:06d}{path.suffix}")
    return folder


def converted(images: Path, beton: Path, resolution: int) -> Dataset:
    """The images as a .beton, and beside it the same JPEGs as files."""
    command = [sys.executable, "data_prep/to_ffcv.py", str(images), str(beton), "--max-resolution", str(resolution)]
    subprocess.run(command, cwd=measure.ROOT, check=True, stdout=sys.stderr)
    reader = Reader(str(beton))
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    (beton.with_suffix("") / "one").mkdir(parents=True)
    with beton.open("rb") as file:
        for sample, pointer in enumerate(reader.metadata["f0"]["data_ptr"].tolist()):
            file.seek(pointer)
            (beton.with_suffix("") / "one" / f"{sample:06d}.jpg").write_bytes(file.read(sizes[pointer]))
    return inspect_dataset(beton)


# ----------------------------------------------------------------------------------------------------------- sides


def our_loader(dataset: Dataset, workers: int, batch: int) -> PretrainingLoader:
    """The loader of a pretraining run in one process."""
    return PretrainingLoader(
        dataset,
        MultiblockSampler(seed=0, grid=GRID, context_tokens=CONTEXT_TOKENS),
        image_size=SIZE,
        crops=Crops(SCALE, RATIO),
        global_batch=batch,
        micro_batch=batch,
        num_workers=workers,
    )


class WholeImages(RandomResizedCropRGBImageDecoder):
    """FFCV's decoder without what follows it: no crop, no resizing."""

    def generate_code(self) -> Callable:
        """The function that FFCV compiles."""
        read, iterator, decode_jpeg = self.memory_read, Compiler.get_iterator(), Compiler.compile(imdecode)

        def decode(batch_indices, memory, metadata, storage_state):
            images, scratch = memory
            for position in iterator(len(batch_indices)):
                field = metadata[batch_indices[position]]
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                data = read(field["data_ptr"], storage_state)
                decode_jpeg(data, scratch[position], height, width, height, width, 0, 0, 1, 1, False, False)
            return images[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


def ffcv_loader(decoder: type, dataset: Dataset, workers: int, options: argparse.Namespace) -> Batches:
    """FFCV as its documentation has it; several epochs are one order, so that none of its starts are counted."""
    loader = Loader(
        dataset.path,
        batch_size=options.batch,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(dataset.num_samples, dtype=np.uint64), options.epochs),
        pipelines={"image": [decoder(SIZE, SCALE, RATIO), ToTensor()], "label": None},
    )
    return lambda: (len(images) for (images,) in loader)


def torchvision_loader(folder: Path, workers: int, batch: int) -> Batches:
    """The usual loader of images from files."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, PILToTensor, RandomResizedCrop

    dataset = ImageFolder(str(folder), Compose([RandomResizedCrop(SIZE, SCALE, RATIO), PILToTensor()]))
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True)
    return lambda: (len(images) for images, _ in loader)


def rates(batches: Iterator[int]) -> tuple[float, float]:
    """Seconds, and seconds of this process's processor time, for each image after the first batch."""
    next(batches)
    clock, processor, images = time.perf_counter(), time.process_time(), 0
    for count in batches:
        images += count
    return (time.perf_counter() - clock) / images, (time.process_time() - processor) / images


# ---------------------------------------------------------------------------------------------------------- results


def measured(dataset: Dataset, resolution: int, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """All sides at one resolution and number of workers, and the steps of ours."""
    loader = our_loader(dataset, workers, options.batch)
    steps = options.epochs * loader.steps_per_epoch
    sides: dict[str, Batches] = {
        OURS: lambda: (len(batch.images) for step in loader.from_step(0, steps) for batch in step),
        FFCV: ffcv_loader(RandomResizedCropRGBImageDecoder, dataset, workers, options),
        DECODER: ffcv_loader(WholeImages, dataset, workers, options),
        TORCHVISION: torchvision_loader(Path(dataset.path).with_suffix(""), workers, options.batch),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(1 + options.rounds):
        for name, batches in sides.items():
            taken = rates(batches())
            if turn > 0:
                seconds[name].append(taken)
    return {
        "resolution": resolution,
        "workers": workers,
        "sides": {name: side(seconds, name) for name in sides},
        "steps": step_times(loader, options.steps_epochs),
    }


def side(seconds: dict[str, list[tuple[float, float]]], name: str) -> dict[str, float]:
    """Medians of a side, and of its rate over bare FFCV's in the same round."""
    clock, processor = zip(*seconds[name], strict=True)
    found = {
        "images_per_second": round(1 / statistics.median(clock), 1),
        "over_ffcv": round(statistics.median(ffcv[0] / s for ffcv, s in zip(seconds[FFCV], clock, strict=True)), 3),
    }
    if name != TORCHVISION:
        over = statistics.median(ffcv[1] / s for ffcv, s in zip(seconds[FFCV], processor, strict=True))
        found |= {"processor_us_per_image": round(1e6 * statistics.median(processor), 1)}
        found |= {"over_ffcv_by_processor_time": round(over, 3)}
    return found


def step_times(loader: PretrainingLoader, epochs: int) -> dict[str, float]:
    """Median milliseconds until a step's images arrive: of an epoch's first step, and of all others."""
    arrived = [time.perf_counter() for batches in loader.from_step(0, epochs * loader.steps_per_epoch) for _ in batches]
    first, others = [], []
    for step in range(loader.steps_per_epoch, len(arrived)):  # the first epoch fills the buffers
        of_kind = first if step % loader.steps_per_epoch == 0 else others
        of_kind.append(1e3 * (arrived[step] - arrived[step - 1]))
    return {
        "across_an_epochs_end_ms": round(statistics.median(first), 2),
        "any_other_ms": round(statistics.median(others), 2),
    }


def show(results: list[dict[str, Any]]) -> None:
    """A table of each result."""
    header = ["images/s", "over FFCV", "CPU us/image", "over FFCV by CPU"]
    for result in results:
        rows = [[name, *values.values(), *[None] * (4 - len(values))] for name, values in result["sides"].items()]
        print(f"\n{result['resolution']} px, workers: {result['workers']}")
        print(measure.table(rows, ["", *header]))
        steps = result["steps"]
        print(
            f"a step across an epoch's end {steps['across_an_epochs_end_ms']} ms, any other {steps['any_other_ms']} ms"
        )


if __name__ == "__main__":
    main()
