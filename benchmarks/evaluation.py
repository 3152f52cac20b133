"""What the evaluation costs over what it cannot do without.

    python benchmarks/evaluation.py                                    # a small encoder, a CPU, under two minutes
    python benchmarks/evaluation.py --encoder huge --patch-size 14 --image-size 224 --images 8192 --batch 2048 \
        --classes 1000 --train data/imagenet/val.beton                 # a GPU

extraction: images/s of feature extraction (reading, decoding, copying, the forward pass, results on the CPU), as a
share of the bare forward pass's images/s on one batch that lies on the device.
grid: seconds of an epoch of the augmented linear protocol with its 48 heads, over those of one with a single head.

Both sides of a ratio are measured in turns, medians are given. On a CPU the reading takes cores from the forward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np
import torch

from ijepa_ds.build import build_encoder
from ijepa_ds.config import parse_config
from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.data.image_loader import ImageLoader
from ijepa_ds.distributed import Process, share_cpu_threads
from ijepa_ds.evaluation.candidates import Candidate, pooled_features
from ijepa_ds.evaluation.features import extract_features
from ijepa_ds.evaluation.inputs import AugmentedInputs
from ijepa_ds.evaluation.probes.heads import HeadGrid
from ijepa_ds.evaluation.probes.recipes import LINEAR


def main() -> None:
    """Measure both ratios and print them as JSON."""
    options = parse()
    share_cpu_threads()
    device = options.device
    process = Process(0, 1, device)
    encoder = make_encoder(options, device)
    with tempfile.TemporaryDirectory() as folder:
        dataset = inspect_dataset(options.train or make_images(Path(folder), options))
        samples = np.arange(min(options.images, dataset.num_samples))
        shared = {
            "image_size": (options.image_size, options.image_size),
            "batch_size": options.micro_batch,
            "num_workers": options.workers,
        }
        loader = ImageLoader(dataset, crop_share=0.875, **shared)
        forward = measure.in_turns(
            {
                "bare": lambda: bare_forward(encoder, options, len(samples), device),
                "extraction": lambda: extract_features(encoder.forward, loader, samples, process),
            },
            rounds=options.repeats,
            device=device,
        )
        inputs = AugmentedInputs(
            ImageLoader(dataset, augment=True, seed=0, **shared),
            samples,
            torch.from_numpy(samples % options.classes),
            encoder.forward,
            batch=min(options.batch, len(samples)),
            seed=0,
            process=process,
        )
        epochs = measure.in_turns(
            {
                "one head": lambda: epoch(inputs, encoder, num_heads=1),
                "48 heads": lambda: epoch(inputs, encoder, num_heads=48),
            },
            rounds=options.repeats,
            device=device,
        )
    results = {
        "extraction": {
            "bare_forward_images_per_second": round(len(samples) / statistics.median(forward["bare"]), 1),
            "extraction_images_per_second": round(len(samples) / statistics.median(forward["extraction"]), 1),
            "ratio": round(measure.ratio(forward, "bare", "extraction"), 3),
            "wanted": ">= 0.9",
        },
        "grid": {
            "epoch_seconds_with_1_head": round(statistics.median(epochs["one head"]), 3),
            "epoch_seconds_with_48_heads": round(statistics.median(epochs["48 heads"]), 3),
            "ratio": round(measure.ratio(epochs, "48 heads", "one head"), 3),
            "wanted": "< 1.3",
        },
    }
    print(json.dumps(results, indent=1))
    measure.save(measure.record(results, compared=__doc__, device=device), options.json)


def parse() -> argparse.Namespace:
    """The sizes of what is measured."""
    parser = measure.parser(__doc__)
    parser.add_argument("--encoder", default="tiny", help="tiny to giant")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256, help="of the heads")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", help="a .beton to read (default: noise, made for the occasion)")
    return parser.parse_args()


def make_encoder(options: argparse.Namespace, device: torch.device) -> Candidate:
    """A bf16 encoder of random weights: its cost does not depend on them."""
    config = parse_config(
        {
            "train_batch_size": 1,
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "ijepa": {
                "run": {"name": "benchmark"},
                "data": {"train": "none", "image_size": options.image_size},
                "model": {"encoder": options.encoder, "patch_size": options.patch_size},
            },
        }
    )
    module = build_encoder(config).to(device, torch.bfloat16).eval().requires_grad_(False)
    views = {"last": slice(-module.embed_dim, None), "last4": slice(None)}
    return Candidate("random", 0, views, pooled_features(module, config), module)


def make_images(folder: Path, options: argparse.Namespace) -> str:
    """A .beton of JPEGs a little larger than the encoder's input, by the project's converter."""
    from PIL import Image

    draw, side = np.random.default_rng(0), round(options.image_size / 0.875)
    (folder / "images" / "one").mkdir(parents=True)
    for index in range(options.images):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side)).save(folder / "images" / "one" / f"{index:06d}.jpg", quality=90)
    beton = folder / "noise.beton"
    command = [sys.executable, "data_prep/to_ffcv.py", str(folder / "images"), str(beton)]
    subprocess.run(command, cwd=measure.ROOT, check=True, stdout=sys.stderr)
    return str(beton)


@torch.no_grad()
def bare_forward(encoder: Candidate, options: argparse.Namespace, num_images: int, device: torch.device) -> None:
    """The transformer alone, on a batch that is there."""
    size = options.image_size
    images = torch.zeros(options.micro_batch, 3, size, size, device=device, dtype=torch.bfloat16)
    for start in range(0, num_images, options.micro_batch):
        encoder.module(images[: num_images - start])


def epoch(inputs: AugmentedInputs, encoder: Candidate, *, num_heads: int) -> None:
    """One epoch of the linear protocol with the first ``num_heads`` heads of its grid."""
    recipe = dataclasses.replace(LINEAR, batch=inputs.batch, lrs=LINEAR.lrs if num_heads > 1 else (0.05,))
    # At a batch of 256 the protocol's two readings of a rate are one: here they are always two.
    heads = [
        dataclasses.replace(head, lr=head.lr * factor)
        for factor in (1, 2)
        for head in dataclasses.replace(recipe, lr_scales=("as given",)).heads(("last", "last4"))
    ][:num_heads]
    assert len(heads) == num_heads
    grid = HeadGrid(heads, encoder.views, 4 * encoder.module.embed_dim, inputs, optimizer="lars")
    for rows, labels in inputs.epoch(0):
        grid.step(rows, labels.to(rows.device), total=len(rows), lr_factor=1.0)


if __name__ == "__main__":
    main()
