"""The moving average's update and cast against a copy of as many bytes, and against one tensor at a time.

    python benchmarks/ema.py                        # ViT-H/14 on a GPU, ViT-S/16 on a CPU
    python benchmarks/ema.py --encoder giant --patch-size 16

Ours is what a training step calls, ijepa_ds.engine.moving_average, on one process's flat slices: it reads the average
and the masters (fp32), writes the average, and casts it to the working dtype, which is read and written once more. One
tensor at a time is how it is usually written; with the same cast, and without. All are timed in turns; the bytes are
those that must move at least.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import measure
import torch
from torch import Tensor

from ijepa_ds.distributed import share_cpu_threads
from ijepa_ds.engine.moving_average import MovingAverage
from ijepa_ds.engine.shards import MasterShard, Placement
from ijepa_ds.method.encoder import VisionTransformer, dimensions_of
from ijepa_ds.method.ijepa import CONTEXT_ENCODER

MOMENTUM = 0.996
OURS, COPY = "ours: update and cast", "copy of as many bytes"
LOOP, UNCAST = "tensor by tensor, and cast", "tensor by tensor, no cast"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure for both working dtypes, print a table, return the record."""
    options = parse(arguments)
    share_cpu_threads()
    print(measure.first_paragraph(__doc__))
    shapes = shapes_of(options.encoder, options.patch_size)
    results = [compare(shapes, dtype, options) for dtype in (torch.bfloat16, torch.float32)]
    rows = [[r["dtype"], name, side["ms"], side["gb_per_second"]] for r in results for name, side in r["sides"].items()]
    print(f"\n{options.encoder}: {sum(s.numel() for s in shapes.values()) / 1e6:.1f} M parameters")
    print(measure.table(rows, ["working dtype", "side", "ms", "GB/s"]))
    for r in results:
        print(
            f"{r['dtype']}: ours at {r['share_of_copy_bandwidth']:.2f} of the copy's bandwidth, "
            f"{r['loop_over_ours']:.2f} x as fast as the loop with its cast"
        )
    result = measure.record(results, compared=__doc__, device=options.device)
    measure.save(result, options.json)
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Which encoder, and how often."""
    parser = measure.parser(__doc__)
    parser.add_argument("--encoder", help="tiny to giant (default: huge on a GPU, small on a CPU)")
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    options.encoder = options.encoder or ("huge" if options.device.type == "cuda" else "small")
    return options


def shapes_of(encoder: str, patch_size: int) -> dict[str, torch.Size]:
    """Shapes of an encoder's trained parameters."""
    with torch.device("meta"):
        module = VisionTransformer((16 * patch_size, 16 * patch_size), patch_size, dimensions_of(encoder))
    return {name: p.shape for name, p in module.named_parameters() if p.requires_grad}


def masters_of(shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device) -> list[MasterShard]:
    """The flat slices of one process, as ZeRO lays them: what decays and what does not."""
    shards = []
    for group, decays in (("decay", True), ("no_decay", False)):
        placements, start = [], 0
        for name, shape in shapes.items():
            if (len(shape) > 1) == decays:
                placements.append(Placement(f"{CONTEXT_ENCODER}.{name}", start, shape))
                start = placements[-1].stop
        master = torch.rand(start, device=device)
        weights = master.to(dtype)
        name = f"{CONTEXT_ENCODER}_{group}"
        shards.append(MasterShard(name, tuple(placements), 0, start, None, master, weights, master))
    return shards


def compare(shapes: dict[str, torch.Size], dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """All sides with weights that compute in ``dtype``."""
    device = options.device
    shards = masters_of(shapes, dtype, device)
    average, applied = MovingAverage(shards), torch.tensor(True, device=device)
    masters = [shard.master[p.start : p.stop].view(p.shape).clone() for shard in shards for p in shard.placements]
    averages = [master.clone() for master in masters]
    weights = [master.to(dtype) for master in masters]
    count = sum(master.numel() for master in masters)
    bytes_of = {UNCAST: 12 * count, LOOP: (12 + 4 + dtype.itemsize) * count}
    bytes_of[OURS] = bytes_of[COPY] = bytes_of[LOOP]
    source = torch.ones(bytes_of[COPY] // 8, device=device)
    target = torch.empty_like(source)
    sides = {
        OURS: lambda: average.update(MOMENTUM, applied),
        COPY: lambda: target.copy_(source),
        LOOP: lambda: tensor_by_tensor(averages, masters, weights),
        UNCAST: lambda: tensor_by_tensor(averages, masters, []),
    }
    seconds = measure.in_turns(sides, rounds=options.rounds, device=device)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": count,
        "sides": {
            name: {"ms": 1e3 * taken, "gb_per_second": bytes_of[name] / taken / 1e9} for name, taken in medians.items()
        },
        "share_of_copy_bandwidth": measure.ratio(seconds, COPY, OURS),
        "loop_over_ours": measure.ratio(seconds, LOOP, OURS),
    }


@torch.no_grad()
def tensor_by_tensor(averages: list[Tensor], masters: list[Tensor], weights: list[Tensor]) -> None:
    """The average as it is usually written; cast to ``weights``, if any."""
    for average, master in zip(averages, masters, strict=True):
        average.mul_(MOMENTUM).add_(master, alpha=1 - MOMENTUM)
    for weight, average in zip(weights, averages, strict=False):
        weight.copy_(average)


if __name__ == "__main__":
    main()
