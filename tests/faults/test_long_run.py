"""What a run of many steps keeps: memory, open files and threads, on each of two ranks."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from distributed_runs import FOLDER, GLOBAL_BATCH, run_training, tiny_config
from fault_rows import Row

STEPS, EVERY = 20_000, 250
SETTLED = STEPS // 5  # steps after which nothing may grow


def note_what_is_held() -> None:
    """Every so many steps, before a save begins: step, unshared memory in MB, open files, threads."""
    from ijepa_ds.train import Run

    original, me = Run.after_step, psutil.Process()
    file = FOLDER / f"held_{os.environ['RANK']}"

    def after_step(self, step, now, outcome):  # type: ignore[no-untyped-def]
        if step % EVERY == EVERY - 1:
            held = (step, me.memory_full_info().uss / 1e6, me.num_fds(), threading.active_count())
            with file.open("a") as lines:
                lines.write(" ".join(map(str, held)) + "\n")
        return original(self, step, now, outcome)

    Run.after_step = after_step  # type: ignore[method-assign]


def held_by(file: Path) -> list[list[float]]:
    rows = [[float(value) for value in line.split()] for line in file.read_text().splitlines()]
    return [row for row in rows if row[0] > SETTLED]


@pytest.mark.long
def test_nothing_grows_over_twenty_thousand_steps(row: Callable[[str], Row]) -> None:
    constant = row(f"{STEPS} steps on 2 ranks, with {STEPS // 500} saves and pictures: memory, files and threads")
    config = tiny_config(
        train_micro_batch_size_per_gpu=GLOBAL_BATCH // 2,
        ijepa__run__name="long_run",
        ijepa__run__stop_after_steps=STEPS,
        ijepa__optimization__epochs=STEPS // 4,
        ijepa__monitor={"log_steps": 50, "health_steps": 1000, "picture_steps": 2000, "knn_epochs": 0},
        ijepa__checkpoint={"minutes": 0, "steps": 500, "keep": 2},
    )
    run = run_training(config, 2, prepare=note_what_is_held, timeout=3600)
    assert run.exit_codes == [0, 0], run.output[-3000:]
    for rank in range(2):
        held = held_by(FOLDER / f"held_{rank}")
        half = len(held) // 2
        memory = [statistics.median(row[1] for row in part) for part in (held[:half], held[half:])]
        grown = {"memory in MB": memory[1] - memory[0]}
        for place, name in ((2, "files"), (3, "threads")):
            grown[name] = held[-1][place] - held[0][place]
        constant.figures |= {f"{name} that rank {rank} has more at the end": value for name, value in grown.items()}
        same = grown["memory in MB"] < 2 and grown["files"] <= 0 and grown["threads"] <= 0
        constant.count("survived" if same else "lost", f"rank {rank}: {grown}")
    constant.hold(2)
