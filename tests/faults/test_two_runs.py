"""Two runs in one folder: one of them is refused, and nothing of a killed one is in the way of the next."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_runs import (
    _start,
    _train,
    _wait,
    free_port,
    rank_environment,
    read_rows,
    run_folder,
    tiny_config,
    train_beton,
    write_config,
)

from ijepa_ds.run.lock import LOCK

ROUNDS = 12  # of the long form
PATIENCE = 300  # seconds for a start, or an end: a slow machine must not meet it


class Run:
    """A run in processes of its own that may go on for long; ``prepare`` is called in each before."""

    def __init__(self, config: dict[str, Any], num_ranks: int, prepare: Callable[[], None] | None = None) -> None:
        path, port = write_config(config), free_port()
        self.outputs = [Path(f"{path}.{rank}.output") for rank in range(num_ranks)]
        self.processes = [
            _start(_train, (str(path), prepare), rank_environment(rank, num_ranks, port), output)
            for rank, output in enumerate(self.outputs)
        ]

    @property
    def alive(self) -> bool:
        """Whether no rank has ended."""
        return all(process.exitcode is None for process in self.processes)

    @property
    def output(self) -> str:
        """What all ranks printed."""
        return "".join(output.read_text() for output in self.outputs if output.exists())

    def kill(self) -> None:
        """``kill -9`` to every rank."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def end(self) -> str:
        """How it ended, as :class:`Row` counts it."""
        _wait(self.processes, PATIENCE)
        codes = {process.exitcode for process in self.processes}
        if "Traceback" in self.output:
            return "traceback"
        if codes == {0}:
            return "survived"
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        refused = len(errors) == 1 and "has a run in it already: process " in errors[0]
        return "refused" if refused else "hung" if -signal.SIGKILL in codes else "lost"


def endless(name: str) -> dict[str, Any]:
    """A run that goes on until somebody ends it, with a checkpoint every third step."""
    train_beton()
    return tiny_config(
        ijepa__run__name=name,
        ijepa__model__depth=1,
        ijepa__optimization__epochs=10**5,
        ijepa__checkpoint__steps=3,
        ijepa__checkpoint__keep=2,
    )


def wait_for(condition: Callable[[], object], run: Run) -> None:
    """Until a run has come so far."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert run.alive and time.monotonic() < end, run.output[-3000:]
        time.sleep(0.02)


def steps_of(config: dict[str, Any]) -> list[int]:
    """The logged steps; a line that is garbled fails here."""
    return [row["step"] for row in read_rows(run_folder(config))]


def instead_of_building(action: Callable[[], object]) -> None:
    """Have a run do something else where all is checked and its model would be built."""
    import ijepa_ds.train

    ijepa_ds.train.init_distributed = action


def stay() -> None:
    instead_of_building(lambda: time.sleep(10 * PATIENCE))


def leave() -> None:
    instead_of_building(lambda: sys.exit(0))


def test_a_second_run_is_refused_and_the_next_starts_at_once_after_kill_9(row):
    mine, config = row("two runs in one folder, short"), endless("twice")
    folder = run_folder(config)
    first = Run(config, 1, stay)
    wait_for(lambda: (folder / LOCK).exists() and (folder / LOCK).read_text(), first)
    second = Run(config, 2)
    mine.count(second.end(), second.output)
    assert f"process {first.processes[0].pid} on " in second.output and first.alive
    assert [path.name for path in folder.iterdir()] == [LOCK]  # nothing was written into it
    first.kill()
    third = Run(config, 2, leave)
    mine.count(third.end(), third.output)
    assert mine.counts["refused"] == mine.counts["survived"] == 1
    mine.hold(2)


@pytest.mark.long
def test_many_runs_in_one_folder(row):
    mine, config, draw = row("two runs in one folder"), endless("crowd"), random.Random(1)
    for _ in range(ROUNDS):
        before = max(steps_of(config), default=0)
        together = [Run(config, draw.choice([1, 2])) for _ in range(draw.choice([2, 3]))]  # at the same moment
        owner = owner_of(together)
        for other in together:
            if other is not owner:
                mine.count(other.end(), other.output)
        wait_for(lambda before=before: max(steps_of(config), default=0) > before + draw.randrange(3, 20), owner)
        later = Run(config, draw.choice([1, 2]))
        mine.count(later.end(), later.output)
        assert owner.alive
        owner.kill()
        mine.count("survived")
        steps = steps_of(config)
        assert steps == list(range(1, len(steps) + 1))
    assert mine.counts["survived"] == ROUNDS
    mine.hold(mine.tried)


def owner_of(runs: list[Run]) -> Run:
    """The one that is left when all others have been refused."""
    end = time.monotonic() + PATIENCE
    while sum(run.alive for run in runs) > 1 and time.monotonic() < end:
        time.sleep(0.02)
    [owner] = [run for run in runs if run.alive]
    return owner
