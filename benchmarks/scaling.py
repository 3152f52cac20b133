"""Time of an optimizer step on several processes against one: weak scaling, strong scaling, and time against images.

    python benchmarks/scaling.py                              # all GPUs of this machine; a CPU: 1 and 2 processes
    python benchmarks/scaling.py --config vith14 --images 128 --ranks 1 2 4 8

strong: as many images a step however many processes share them; ideal is 1 / processes of the time. weak: as many
images a step and process; ideal is the time of one. On a CPU each process has one thread, so that processes and not
threads are what is added. Processes are started for each turn (1, 2, 1, 2, ...), batches are made up, the first steps
of a start are not counted; the figure is the median over all turns' steps, the slowest process counting.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections import defaultdict
from typing import Any

import measure
import torch
import workload

from ijepa_ds.distributed import max_over_ranks
from ijepa_ds.engine.zero import init_distributed
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.train import build_trainable

NOW = Hyperparameters(lr=1e-4, weight_decay=0.05, momentum=0.99)
WARM_UP = 2


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    options = parse(arguments)
    if options.worker:
        return measure_rank(options)
    print(measure.first_paragraph(__doc__), flush=True)
    seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for ranks in options.ranks:
            for images, taken in start(ranks, options).items():
                seconds[ranks, int(images)] += taken
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    rows = [scaling_of(*key, medians, options.ranks[0]) for key in sorted(medians)]
    print("\n" + measure.table([list(row.values()) for row in rows], list(rows[0])))
    result = measure.record(
        {"config": options.config, "rows": rows, "seconds_per_image": slopes(medians)},
        compared=__doc__,
        device=options.device,
    )
    for ranks, slope in result["results"]["seconds_per_image"].items():
        fixed, each = 1e3 * slope["fixed_seconds"], 1e3 * slope["seconds_per_image"]
        print(f"{ranks} processes: a step takes {fixed:.1f} ms and {each:.2f} ms an image (least squares)")
    measure.save(result, options.json)
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Which model, images and numbers of processes."""
    parser = measure.parser(__doc__)
    gpus = torch.cuda.device_count()
    parser.add_argument("--config", default="vith14" if gpus else "scenes_tiny", help='of ds_configs/, or "tiny"')
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({1, max(2, gpus)}))
    parser.add_argument("--images", type=int, default=128 if gpus else 16, help="of a step, the fewest; doubled twice")
    parser.add_argument("--steps", type=int, default=10, help="of each turn and number of images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def scaling_of(ranks: int, images: int, medians: dict[tuple[int, int], float], base: int) -> dict[str, Any]:
    """A row of the table; ``base``: the number of processes that the others are compared with."""
    seconds = medians[ranks, images]
    strong, weak = medians.get((base, images)), medians.get((base, images * base // ranks))
    return {
        "processes": ranks,
        "images a step": images,
        "ms a step": 1e3 * seconds,
        "images/s": images / seconds,
        "strong: speed-up": strong and strong / seconds,
        "strong: efficiency": strong and strong / seconds * base / ranks,
        "weak: efficiency": weak and weak / seconds,
    }


def slopes(medians: dict[tuple[int, int], float]) -> dict[int, dict[str, float]]:
    """By number of processes, the line through a step's time over its images."""
    lines = {}
    for ranks in sorted({ranks for ranks, _ in medians}):
        points = [(images, seconds) for (n, images), seconds in medians.items() if n == ranks]
        each, fixed = statistics.linear_regression(*zip(*points, strict=True))
        lines[ranks] = {"fixed_seconds": fixed, "seconds_per_image": each}
    return lines


def start(ranks: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Run the workers; seconds of each counted step by images a step."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    if options.device.type == "cpu":
        shared["OMP_NUM_THREADS"] = "1"
    given = ["--config", options.config, "--images", str(options.images), "--steps", str(options.steps)]
    command = [sys.executable, __file__, "--worker", "--device", str(options.device), *given]
    workers = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    output = workers[0].communicate()[0]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise RuntimeError(f"the processes ended with {codes}:\n{output}")
    return json.loads(output.splitlines()[-1])


def measure_rank(options: argparse.Namespace) -> dict[int, list[float]]:
    """A worker: takes its share of the steps; seconds of each by images a step, which rank 0 prints."""
    process = init_distributed()
    ranks = process.world_size
    seconds: dict[int, list[float]] = {}
    for images in (options.images, 2 * options.images, 4 * options.images):
        share = images // ranks
        config = workload.config_of(options.config, train_batch_size=images, train_micro_batch_size_per_gpu=share)
        trainable = build_trainable(config, process)
        batch = workload.batch_of(config, step=1, device=process.device)
        taken = measure.in_turns(
            {"step": lambda engine=trainable, given=batch: engine.step(iter([given]), NOW)},
            rounds=options.steps,
            device=process.device,
            warm_up=WARM_UP,
        )
        seconds[images] = max_over_ranks(taken["step"], process)
        del trainable
    if process.is_main:
        print(json.dumps(seconds))
    return seconds


if __name__ == "__main__":
    main()
