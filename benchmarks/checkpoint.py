"""A checkpoint's parts (snapshot, write, commit, load) against a bare copy and a bare write of as many bytes.

    python benchmarks/checkpoint.py --folder /where/runs/are                # vith14 on a GPU, vits16 on a CPU
    python benchmarks/checkpoint.py --config vitl16 --rounds 3

snapshot: the state to the host's memory, which training must wait for. write: to a file, until the disk has it.
commit: the folder gets its name. stall: how long `save`, which is all three, holds the training loop, measured around
it; as a share of 30 minutes, the time between two checkpoints. bare copy: one tensor of as many bytes to the host; bare
write: one file of as many bytes, until the disk has it. One process, all timed in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import workload

from ijepa_ds.engine import checkpoint
from ijepa_ds.engine.trainable import State
from ijepa_ds.engine.zero import init_distributed
from ijepa_ds.files import write_synced
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.train import build_trainable

MINUTES = 30  # from one checkpoint to the next, by default


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    options = parse(arguments)
    print(measure.first_paragraph(__doc__), flush=True)
    process = init_distributed()
    config = workload.config_of(options.config, train_batch_size=2, train_micro_batch_size_per_gpu=2)
    trainable = build_trainable(config, process)
    batch = workload.batch_of(config, step=0, device=process.device)
    trainable.step(iter([batch]), Hyperparameters(1e-4, 0.05, 0.99))  # makes Adam's moments, as in a run
    state = trainable.state()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts = Parts(state, process, Path(folder))
        seconds = measure.in_turns(parts.sides(), rounds=options.rounds, device=process.device)
    size = state_bytes(state)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    stall = medians["save (the stall)"]
    print(f"\n{options.config}: {size / 1e6:,.0f} MB; the stall is {stall / (60 * MINUTES):.2%} of {MINUTES} minutes")
    print(measure.table([[name, s, size / s / 1e6] for name, s in medians.items()], ["part", "seconds", "MB/s"]))
    results = {
        "config": options.config,
        "megabytes": size / 1e6,
        "seconds": medians,
        "mb_per_second": {name: size / taken / 1e6 for name, taken in medians.items()},
        "stall_seconds": stall,
        "stall_share_of_30_minutes": stall / (60 * MINUTES),
        "snapshot_over_bare_copy": measure.ratio(seconds, "snapshot", "bare copy"),
        "write_over_bare_write": measure.ratio(seconds, "write", "bare write"),
    }
    result = measure.record(results, compared=__doc__, device=process.device)
    measure.save(result, options.json)
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Which model, and where."""
    parser = measure.parser(__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--config", default="vith14" if gpu else "vits16_single_gpu", help='of ds_configs/, or "tiny"')
    parser.add_argument("--folder", type=Path, help="on the disk that is asked about (default: temporary files)")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


class Parts:
    """The parts of a checkpoint as calls without arguments, each leaving what the next one needs."""

    def __init__(self, state: State, process: Any, folder: Path) -> None:
        self.state, self.process, self.folder = state, process, folder
        self.flat = torch.ones(state_bytes(state) // 4, device=process.device)
        self.host = torch.ones_like(self.flat, device="cpu")
        self.copied = checkpoint.snapshot(state)
        self.saved = checkpoint.save(folder, 1, state, process, keep=1)
        self.record: Any = None  # of the file that was written

    def sides(self) -> dict[str, Callable[[], object]]:
        """By name, in the order in which a checkpoint has them."""
        return {
            "snapshot": self.snapshot,
            "write": self.write,
            "commit": self.commit,
            "load": lambda: checkpoint.load(self.saved, self.state, self.process),
            "save (the stall)": lambda: checkpoint.save(self.folder, 1, self.state, self.process, keep=1),
            "bare copy": lambda: self.flat.to("cpu", copy=True),
            "bare write": self.bare_write,
        }

    def snapshot(self) -> None:
        self.copied = checkpoint.snapshot(self.state)

    def write(self) -> None:
        checkpoint.begin(self.folder, 2, self.process)
        self.record = checkpoint.write(self.copied, checkpoint.unfinished(self.folder, 2), 2, self.process)

    def commit(self) -> None:
        self.saved = checkpoint.commit(self.folder, 2, self.copied, self.record, self.process, keep=1)

    def bare_write(self) -> None:
        path = self.folder / "bare"
        write_synced(path, lambda file: file.write(memoryview(self.host.numpy()).cast("B")))
        path.unlink()


def state_bytes(state: State) -> int:
    """Of all slices of this process."""
    return sum(values.numel() * values.element_size() for slices in state.slices.values() for _, values in slices)


if __name__ == "__main__":
    main()
