"""Runs that are attacked while they train, and processes of a run that do not even train."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed_runs import FOLDER, _start, _train, free_port, rank_environment, tiny_config, train_beton, write_config

OLDEST = 20.0  # seconds that a process may be there after its run was broken


class Ranks:
    """Processes that have met as one run.

    Args:
        function: what each does.
        arguments: of it.
        world_size: number of ranks.
    """

    def __init__(self, function: Callable[..., object], arguments: tuple, world_size: int) -> None:
        folder = FOLDER / f"ranks_{time.monotonic_ns()}"
        folder.mkdir()
        self.files = [folder / str(rank) for rank in range(world_size)]
        port = free_port()
        self.processes = [
            _start(function, arguments, rank_environment(rank, world_size, port), self.files[rank])
            for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, if it is still there."""
        if self.processes[rank].exitcode is None:
            os.kill(self.processes[rank].pid, number)

    def wait_for(self, text: str, *ranks: int, seconds: float = 600.0) -> None:
        """Until one of these ranks (none: of all) has printed ``text``."""
        end = time.monotonic() + seconds
        while not any(text in self.output(rank) for rank in ranks or range(len(self.files))):
            assert time.monotonic() < end and self.alive(), f"no {text!r}:\n{self.outputs()[-2000:]}"
            time.sleep(0.02)

    def wait(self, seconds: float, *ranks: int) -> float | None:
        """Seconds until these ranks (none: all) have ended, None if some have not after ``seconds``."""
        began = time.monotonic()
        while self.alive(*ranks):
            if time.monotonic() - began > seconds:
                return None
            time.sleep(0.02)
        return time.monotonic() - began

    def ask_to_stop(self) -> None:
        """SIGTERM to those that are left, a second after the first has ended: as DeepSpeed's launcher does."""
        time.sleep(1.0)
        for rank in self.alive():
            self.send(rank, signal.SIGTERM)

    def wait_for_an_end(self, seconds: float = 600.0) -> None:
        """Until one of them has ended."""
        end = time.monotonic() + seconds
        while len(self.alive()) == len(self.processes) and time.monotonic() < end:
            time.sleep(0.02)

    def alive(self, *ranks: int) -> list[int]:
        """Which of these ranks (none: of all) are still there."""
        return [rank for rank in ranks or range(len(self.processes)) if self.processes[rank].exitcode is None]

    @property
    def exit_codes(self) -> list[int]:
        """By rank."""
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self.files[rank].read_text() if self.files[rank].exists() else ""

    def outputs(self) -> str:
        """What each has printed."""
        return "\n".join(f"-- rank {rank}:\n{self.output(rank)}" for rank in range(len(self.files)))


def training(config: dict[str, Any], world_size: int, prepare: Callable[[], None] | None = None) -> Ranks:
    """Ranks that train; ``prepare`` is called in each before, to patch something."""
    train_beton()
    return Ranks(_train, (str(write_config(config)), prepare), world_size)


def attacked_config(name: str, folder: Path = FOLDER / "attacked", **changes: Any) -> dict[str, Any]:
    """Twelve steps of a model of one layer, with a checkpoint after every second, in which five seconds are silence."""
    settings = {
        "ijepa__run__name": name,
        "ijepa__run__folder": str(folder),
        "ijepa__run__silence_seconds": 5,
        "ijepa__model__depth": 1,
        "ijepa__model__predictor_depth": 1,
        "ijepa__optimization__epochs": 3,
        "ijepa__checkpoint__steps": 2,
        "ijepa__checkpoint__keep": 2,
    }
    return tiny_config(**{**settings, **changes})
