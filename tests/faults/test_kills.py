"""kill -9 at random and chosen moments: what comes after is bit-equal to a run that nobody killed."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attacked_runs import OLDEST, attacked_config, training
from distributed_runs import assert_same_tensors, checkpoint_tensors, once, read_rows, run_folder
from fault_rows import Row

LAST_STEP = 12
MOMENTS = ("meeting", "beating", "writing", "before naming", "after naming", "pruning")


def die() -> None:
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, rank: int, call: int) -> None:
    """On one rank, SIGKILL at the ``call``-th time that it comes to a moment."""
    if os.environ["RANK"] != str(rank):
        return
    from ijepa_ds import meeting
    from ijepa_ds.engine import checkpoint_files, checkpoint_writer
    from ijepa_ds.run import heartbeat

    calls = iter(range(1, 10**6))
    if moment == "pruning":
        checkpoint_files.shutil = _Removing(functools.partial(die_halfway, calls, call))  # type: ignore[assignment]
        return
    owner, name = {
        "meeting": (meeting.Meeting, "agree"),
        "beating": (heartbeat.Heartbeat, "__enter__"),
        "writing": (checkpoint_writer, "write_rank_file"),
        "before naming": (checkpoint_writer, "_take_place"),
        "after naming": (checkpoint_writer, "_take_place"),
    }[moment]
    whole = getattr(owner, name)

    def fatal(*arguments: Any) -> Any:
        last = next(calls) >= call
        if last and moment in ("meeting", "before naming"):
            die()
        result = whole(*arguments)
        if last and moment == "writing":  # half of the file
            os.truncate(arguments[0], arguments[0].stat().st_size // 2)
        if last:
            die()
        return result

    setattr(owner, name, fatal)


class _Removing:
    def __init__(self, rmtree: Callable[..., None]) -> None:
        self.rmtree = rmtree


def die_halfway(calls: Iterator[int], call: int, path: Path, **named: Any) -> None:
    """Remove a folder, or, at the call, one of its files."""
    if next(calls) < call or not path.exists():
        shutil.rmtree(path, **named)
        return
    next(path.iterdir()).unlink()
    die()


@once
def undisturbed(world_size: int) -> tuple[list[float], dict, float]:
    """(losses, the last checkpoint, seconds from start to end)."""
    config = attacked_config(f"undisturbed_{world_size}")
    began = time.monotonic()
    with training(config, world_size) as ranks:
        assert ranks.wait(600) is not None and set(ranks.exit_codes) == {0}, ranks.outputs()
    folder = run_folder(config)
    losses = [row["loss"] for row in read_rows(folder)]
    return losses, checkpoint_tensors(folder, LAST_STEP), time.monotonic() - began


class Attack:
    """One run that is killed again and again, and then left alone."""

    def __init__(self, name: str, world_size: int, row: Row, draw: random.Random) -> None:
        self.config, self.world_size, self.row, self.draw = attacked_config(name), world_size, row, draw
        self.said: list[str] = []

    def kill(self, moment: str | None, rank: int, call: int) -> None:
        """Start the run, kill one rank at a moment (None: at a random one), and wait until the others have left."""
        what = f"{self.config['ijepa']['run']['name']}: {moment or 'at random'}, rank {rank}, call {call}"
        prepare = None if moment is None else functools.partial(die_at, moment, rank, call)
        with training(self.config, self.world_size, prepare) as ranks:
            if moment is None:
                time.sleep(self.draw.uniform(0, undisturbed(self.world_size)[2]))
                ranks.send(rank, signal.SIGKILL)
            ranks.wait_for_an_end()
            if set(ranks.exit_codes) - {0, None}:  # before ranks have met, nobody else knows that one has come
                ranks.ask_to_stop()
            seconds = ranks.wait(OLDEST)
        longest = "longest s until the others had left"
        self.row.figures[longest] = round(max(self.row.figures.get(longest, 0.0), seconds or OLDEST), 1)
        if seconds is None:
            self.row.count("hung", f"{what}\n{ranks.outputs()}")
        elif any(word in ranks.outputs() for word in ("Traceback", "gloo", "frame #")):
            self.row.count("traceback", f"{what}\n{ranks.outputs()}")
        else:
            self.said.append(what)

    def finish(self) -> None:
        """Let it go on to the end: was anything lost?"""
        with training(self.config, self.world_size) as ranks:
            ended = ranks.wait(600) is not None and set(ranks.exit_codes) == {0}
        losses, tensors, _ = undisturbed(self.world_size)
        folder = run_folder(self.config)
        outcome, what = "survived", ""
        try:
            assert ended, ranks.outputs()
            assert [row["loss"] for row in read_rows(folder)] == losses
            assert_same_tensors(checkpoint_tensors(folder, LAST_STEP), tensors)
            kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
            assert kept == [f"step_{step:09d}" for step in (LAST_STEP - 2, LAST_STEP)], kept
        except (AssertionError, OSError) as error:
            outcome, what = "lost", f"{self.said}: {error}"
        for _ in self.said:
            self.row.count(outcome, what)
        self.row.record()


@pytest.mark.long
def test_a_kill_leaves_what_an_undisturbed_run_leaves(row) -> None:
    attack = Attack("killed", 2, kills := row("kills, short form"), random.Random(0))
    attack.kill("writing", 1, 2)
    attack.finish()
    kills.hold(1)


@pytest.mark.long
def test_100_kills(row) -> None:
    kills, draw = row("kill -9 at random and chosen moments, 1 and 2 ranks"), random.Random(7)
    for number in range(25):
        world_size = 1 if number % 3 == 0 else 2
        attack = Attack(f"killed_{number}", world_size, kills, draw)
        for _ in range(4):
            moment = draw.choice([None, None, None, *MOMENTS])
            first = world_size == 1 or moment in ("before naming", "after naming", "pruning")
            attack.kill(moment, 0 if first else draw.randrange(2), draw.choice([1, 2]))
        attack.finish()
    kills.hold(100)
