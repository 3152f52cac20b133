"""Masks of the pretraining loader: microseconds an image on one thread, and their share of the loader's time.

    python benchmarks/masks.py
    python benchmarks/masks.py --train data/imagenet/train.beton        # the share on your own images

The code is what the loader's threads run, FFCV's compilation included, on batches of 512 images, another step in each
run. `us_per_image` is the multiblock sampler's on 16 x 16 patches with 72 context tokens. The share is that time over
the processor time that the whole loader takes for an image on one thread, crops of 224 px from the file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loader as loading
import measure
import numpy as np
import torch

from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.data.ffcv_pipeline import Request, SampleMasks
from ijepa_ds.method.masks import MaskSampler, MultiblockSampler, ReferenceSampler, default_context_tokens

# isort: split
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.graph import INITIAL_STATE

GRIDS = [(16, 16), (14, 14), (28, 28), (37, 37), (8, 8)]
REFERENCE_GRIDS = [(16, 16), (14, 14), (28, 28)]  # it refuses small ones
IMAGES = 512
WANTED_US, WANTED_SHARE = 1.0, 0.05


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure both samplers on several grids and the loader, print a table, return the record."""
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--train", type=Path, help="a .beton (default: rendered scenes of 256 px)")
    options = parser.parse_args(arguments)
    budgets = [(grid, default_context_tokens(grid)) for grid in GRIDS]
    samplers: list[MaskSampler] = [MultiblockSampler(seed=0, grid=grid, context_tokens=k) for grid, k in budgets]
    samplers += [ReferenceSampler(seed=0, grid=grid) for grid in REFERENCE_GRIDS]
    seconds = measure.in_turns(
        {name_of(sampler): drawing(sampler) for sampler in samplers},
        rounds=options.rounds,
        warm_up=10,
        device=torch.device("cpu"),
    )
    us = {name: round(1e6 * statistics.median(taken) / IMAGES, 3) for name, taken in seconds.items()}
    ours, loader_us = us[name_of(samplers[0])], loader_us_per_image(options)
    results = {
        "us_per_image": ours,
        "us_per_image_wanted": f"<= {WANTED_US}",
        "share_of_the_loaders_time": round(ours / loader_us, 4),
        "share_wanted": f"<= {WANTED_SHARE}",
        "loader_us_per_image": round(loader_us, 1),
        "samplers": us,
    }
    print(measure.table([[name, value] for name, value in us.items()], ["masks", "us an image"]))
    print(f"{ours / loader_us:.2%} of the loader's {loader_us:.0f} us an image")
    record = measure.record(results, compared=__doc__ or "", device=torch.device("cpu"))
    measure.save(record, options.json)
    return record


def name_of(sampler: MaskSampler) -> str:
    """Which sampler on which grid."""
    kind = f"multiblock, K = {sampler.context_tokens}" if isinstance(sampler, MultiblockSampler) else "reference"
    return f"{sampler.grid[0]} x {sampler.grid[1]} {kind}"


def drawing(sampler: MaskSampler) -> Callable[[], None]:
    """Draws the masks of a batch with the loader's code on one thread; the next step's in each call."""
    Compiler.set_num_threads(1)
    operation = SampleMasks(sampler)
    _, allocation = operation.declare_state_and_memory(INITIAL_STATE)
    draw, rows = Compiler.compile(operation.generate_code()), np.zeros((IMAGES, *allocation.shape), np.int32)
    steps = iter(range(10**9))

    def draw_next() -> None:
        draw(Request(np.arange(IMAGES), next(steps)).keys, rows, None, None)

    return draw_next


def loader_us_per_image(options: argparse.Namespace) -> float:
    """Processor time of the whole loader for an image, one thread, in microseconds: the median of a few traversals."""
    with tempfile.TemporaryDirectory() as name:
        if options.train is None:
            sizes = argparse.Namespace(scenes=64, resolutions=[256])
            images = loading.repeated(loading.rendered(Path(name), sizes), Path(name) / "images", 640)
            dataset = loading.converted(images, Path(name) / "256.beton", 256)
        else:
            dataset = inspect_dataset(options.train)
        whole = loading.our_loader(dataset, workers=1, batch=64)
        steps = min(whole.steps_per_epoch, 40)
        taken = []
        for _ in range(5):
            batches = (len(batch.images) for step in whole.from_step(0, steps) for batch in step)
            taken.append(loading.rates(batches)[1])
    return 1e6 * statistics.median(taken)


if __name__ == "__main__":
    main()
