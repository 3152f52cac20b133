"""A checkpoint's parts against a bare copy and a bare write of as many bytes, and what training feels of it.

    python benchmarks/checkpoint.py --folder /where/runs/are                # vith14 on a GPU, vits16 on a CPU
    python benchmarks/checkpoint.py --config vitb16 --rounds 3 --threads 1  # 100 M parameters, a core left for the disk

snapshot: the state to the host's memory, which training must wait for. write: to a file, until the disk has it. load:
all of it again. save, waiting: what a run does at its end or when it is stopped. bare copy: one tensor of as many bytes
to the host; bare write: one file of as many bytes, until the disk has it. These in turns.

Then steps: `--steps` of them undisturbed, then a save in the background and steps until it is complete, in turns.
blocked: seconds that the loop was held in all, at the beginning and when the checkpoint got its name. slow-down: how
much longer a step takes while another thread writes. One process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import workload

from ijepa_ds.config import Config
from ijepa_ds.engine import checkpoint, checkpoint_writer
from ijepa_ds.engine.snapshot import HostCopies, views
from ijepa_ds.engine.trainable import State
from ijepa_ds.engine.zero import init_distributed
from ijepa_ds.files import write_synced
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.run.saving import Saver
from ijepa_ds.settings import CheckpointConfig
from ijepa_ds.train import build_trainable

NOW = Hyperparameters(1e-4, 0.05, 0.99)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, return the record."""
    options = parse(arguments)
    print(measure.first_paragraph(__doc__), flush=True)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    process = init_distributed()
    changes = {"ijepa__data__image_size": options.image_size} if options.image_size else {}
    size = options.images
    config = workload.config_of(options.config, train_batch_size=size, train_micro_batch_size_per_gpu=size, **changes)
    training = Training(config, process)
    training.step()  # makes Adam's moments, as in a run
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts = Parts(training.state, process, Path(folder))
        seconds = measure.in_turns(parts.sides(), rounds=options.rounds, device=process.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        felt = felt_by_training(training, Path(folder), options)
    size = state_bytes(training.state)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    print(f"\n{options.config}: {size / 1e6:,.0f} MB")
    print(measure.table([[name, s, size / s / 1e6] for name, s in medians.items()], ["part", "seconds", "MB/s"]))
    print(
        f"a save in the background: training blocked for {felt['blocked_seconds']:.3f} s in all, of which "
        f"{felt['begin_seconds']:.3f} s for the copy; complete after {felt['complete_seconds']:.2f} s; a step takes "
        f"{felt['step_seconds']:.3f} s, while it is written {felt['slow_down'] - 1:+.1%}"
    )
    results = {
        "config": options.config,
        "megabytes": size / 1e6,
        "seconds": medians,
        "mb_per_second": {name: size / taken / 1e6 for name, taken in medians.items()},
        "snapshot_over_bare_copy": measure.ratio(seconds, "snapshot", "bare copy"),
        "write_over_bare_write": measure.ratio(seconds, "write", "bare write"),
        "background": felt,
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
    parser.add_argument("--steps", type=int, default=10, help="undisturbed ones, before each save")
    parser.add_argument("--images", type=int, default=2, help="of a step")
    parser.add_argument("--image-size", type=int, help="instead of the configuration's: shorter steps")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    return parser.parse_args(arguments)


class Training:
    """A training loop on one batch."""

    def __init__(self, config: Config, process: Any) -> None:
        self.trainable = build_trainable(config, process)
        self.batch = workload.batch_of(config, step=0, device=process.device)
        self.process = process

    @property
    def state(self) -> State:
        return self.trainable.state()

    def step(self) -> float:
        """One optimizer step, its seconds."""
        return measure.seconds_of(lambda: self.trainable.step(iter([self.batch]), NOW), self.process.device)


def felt_by_training(training: Training, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the rounds of what training feels of a save; the first round, whose memory is new, is left out."""
    settings = CheckpointConfig(keep=1)
    said: list[str] = []
    saver = Saver(folder, settings, training.process, steps_per_epoch=1000, say=said.append)
    rounds: list[dict[str, float]] = []
    for turn in range(options.rounds + 1):
        quiet = [training.step() for _ in range(options.steps)]
        began = time.perf_counter()
        saver.save(turn, training.state, None)
        begin = time.perf_counter() - began
        blocked, busy = begin, []
        while saver.saved_step < turn:
            writing = saver.busy
            seconds = training.step()
            if writing and saver.busy:  # from beginning to end
                busy.append(seconds)
            heard = time.perf_counter()
            saver.hear(saver.busy, delay=training.process.world_size > 1)
            blocked += time.perf_counter() - heard
        complete = time.perf_counter() - began
        step, written = statistics.median(quiet), statistics.median(busy) if busy else float("nan")
        figures = {"begin_seconds": begin, "blocked_seconds": blocked, "complete_seconds": complete}
        rounds.append({**figures, "step_seconds": step, "slow_down": written / step, "steps_while_written": len(busy)})
    return {name: statistics.median(figures[name] for figures in rounds[1:]) for name in rounds[0]}


class Parts:
    """The parts of a checkpoint as calls without arguments, each leaving what the next one needs."""

    def __init__(self, state: State, process: Any, folder: Path) -> None:
        self.state, self.process, self.folder = state, process, folder
        self.flat = torch.ones(state_bytes(state) // 4, device=process.device)
        self.host = torch.ones_like(self.flat, device="cpu")
        self.copies = HostCopies()
        self.copied = self.copies.take(state)
        self.saved = self.save()
        (folder / "part").mkdir()

    def sides(self) -> dict[str, Callable[[], object]]:
        """By name, in the order in which a checkpoint has them."""
        return {
            "snapshot": self.snapshot,
            "write": lambda: checkpoint_writer.write_own(self.folder / "part", 2, self.copied, self.process),
            "load": lambda: checkpoint.load(self.saved, self.state, self.process),
            "save, waiting": self.save,
            "bare copy": lambda: self.host.copy_(self.flat),
            "bare write": self.bare_write,
        }

    def snapshot(self) -> None:
        self.copied = self.copies.take(self.state)
        self.copied.wait()

    def save(self) -> Path:
        where = checkpoint_writer.Where(self.folder, keep=1)
        writing = checkpoint_writer.Writing(where, 1, views(self.state), self.process)
        writing.finish()
        assert writing.path is not None
        return writing.path

    def bare_write(self) -> None:
        path = self.folder / "bare"
        write_synced(path, lambda file: file.write(memoryview(self.host.numpy()).cast("B")))
        path.unlink()


def state_bytes(state: State) -> int:
    """Of all slices of this process."""
    return sum(values.numel() * values.element_size() for slices in state.slices.values() for _, values in slices)


if __name__ == "__main__":
    main()
