"""A rank that is stopped (SIGSTOP), stuck in a read or has an error: nobody waits for it, and it is said."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from attacked_runs import OLDEST, Ranks, attacked_config, training
from distributed_runs import FOLDER, run_folder

from ijepa_ds.engine.checkpoint_files import list_checkpoints
from ijepa_ds.meeting import join, own_ranks
from ijepa_ds.run.beats import Beat, Judge
from ijepa_ds.run.heartbeat import GIVEN_UP, Heartbeat

LONG_RUN = {"ijepa__optimization__epochs": 300}


def beats(*counts: int, **of_all: object) -> dict[int, Beat]:
    return {rank: Beat(count, f"node{rank}", **of_all) for rank, count in enumerate(counts)}


def test_who_is_silent_counts_as_dead_after_the_time_of_silence() -> None:
    judge = Judge(60.0, 9.0)
    judge.hear(beats(1, 1, steps=7, what="in a step"), 0.0)
    for second in range(2, 61, 2):
        judge.hear(beats(second, 1, steps=7, what="in a step"), float(second))
        assert judge.verdict(float(second)) is None
    assert judge.verdict(61.0) == "no sign of life for 61 s from rank 1 on node1 (it was in a step, after step 7)"


def test_where_a_connection_broke_off_silence_is_shorter() -> None:
    judge = Judge(60.0, 9.0)
    judge.hear(beats(1, 1, steps=7, what="in a step"), 0.0)
    judge.hear(beats(2, 1, steps=7, what="in a step", broken=True), 8.0)
    assert judge.verdict(9.0) is None
    assert judge.verdict(10.0) == "no sign of life for 10 s from rank 1 on node1 (it was in a step, after step 7)"


def test_who_has_said_goodbye_is_not_missed() -> None:
    judge = Judge(60.0, 9.0)
    judge.hear(beats(1, 1, bye=True), 0.0)
    assert judge.verdict(1000.0) is None


def test_a_run_in_which_nobody_gets_on_ends_and_names_who_is_behind() -> None:
    judge = Judge(60.0, 9.0)
    judge.hear({0: Beat(1, "a", 8, "in a step", 700.0), 1: Beat(1, "b", 7, "in a step", 599.0)}, 0.0)
    assert judge.verdict(1.0) is None
    judge.hear({0: Beat(2, "a", 8, "in a step", 702.0), 1: Beat(2, "b", 7, "in a step", 601.0)}, 2.0)
    assert judge.verdict(2.0) == (
        "no process has got on for 601 s: rank 1 on b is in a step for 601 s, after step 7, "
        "rank 0 on a is in a step for 702 s, after step 8"
    )


def test_a_slow_read_is_reported_once() -> None:
    judge = Judge(60.0, 9.0)
    slow = {1: Beat(1, "b", 7, "waiting for a batch from /data/x.beton", 61.0, 300.0, own=True)}
    judge.hear(slow, 0.0)
    assert judge.reports() == [
        "warning: rank 1 on b has been waiting for a batch from /data/x.beton for 61 s, after step 7; "
        "the run ends after 300 s"
    ]
    assert judge.reports() == []


def beat(silence: float, failing: int | None) -> None:
    """What a rank does that trains for long; ``failing`` has an error."""
    with Heartbeat(join(), silence):
        print("beats", flush=True)
        time.sleep(1.0)
        if own_ranks().rank == failing:
            raise ValueError("something is wrong")
        time.sleep(60)


def test_who_is_stopped_is_left_and_leaves_when_it_is_woken() -> None:
    with Ranks(beat, (2.0, None), 2) as ranks:
        for rank in (0, 1):
            ranks.wait_for("beats", rank)
        time.sleep(0.5)  # until they have heard of each other
        ranks.send(1, signal.SIGSTOP)
        assert ranks.wait(OLDEST, 0) is not None
        ranks.send(1, signal.SIGCONT)
        assert ranks.wait(OLDEST, 1) is not None
    node = socket.gethostname()
    assert ranks.exit_codes == [GIVEN_UP, GIVEN_UP]
    assert f"no sign of life for 2 s from rank 1 on {node} (it was starting, before its first step)" in ranks.output(0)
    assert ranks.output(0).count(" leaves ") == ranks.output(1).count(" leaves") == 1, ranks.outputs()


def test_a_rank_0_that_is_killed_is_missed() -> None:
    with Ranks(beat, (2.0, None), 2) as ranks:
        for rank in (0, 1):
            ranks.wait_for("beats", rank)
        time.sleep(0.5)
        ranks.send(0, signal.SIGKILL)
        assert ranks.wait(OLDEST) is not None
    assert ranks.exit_codes == [-signal.SIGKILL, GIVEN_UP]
    said = f"rank 0's store is gone; rank 0 on {socket.gethostname()} was starting, before its first step\n"
    assert ranks.output(1).endswith(said) and ranks.output(1).count("\n") == 2, ranks.outputs()


def test_the_error_of_one_is_a_line_of_the_other() -> None:
    with Ranks(beat, (20.0, 1), 2) as ranks:
        assert ranks.wait(OLDEST) is not None
    assert ranks.exit_codes == [GIVEN_UP, 1]
    assert ranks.output(0).endswith(f": rank 1 on {socket.gethostname()}: ValueError: something is wrong\n")
    assert "Traceback" in ranks.output(1) and "Traceback" not in ranks.output(0), ranks.outputs()


def stop(rank: int, **changes: object) -> tuple[float | None, str, Ranks]:
    """Stop a rank of two in the middle of a run: (seconds until the other had left, its output, all)."""
    config = attacked_config(f"stopped_{rank}", **{**LONG_RUN, **changes})
    with training(config, 2) as ranks:
        ranks.wait_for(" 5/1200")
        ranks.send(rank, signal.SIGSTOP)
        seconds = ranks.wait(config["ijepa"]["run"]["silence_seconds"] + OLDEST, 1 - rank)
        output = ranks.output(1 - rank)
        ranks.send(rank, signal.SIGCONT)
        assert ranks.wait(OLDEST) is not None, f"the stopped rank went on alone:\n{ranks.outputs()}"
    assert list_checkpoints(run_folder(config) / "checkpoints")
    return seconds, output, ranks


@pytest.mark.long
@pytest.mark.parametrize("silence", [5.0, 60.0])
def test_stopped_ranks_are_noticed(row, silence) -> None:
    stopped = row(f"a rank stopped (SIGSTOP) for good, {silence:.0f} s of silence")
    for rank in (1, 0):
        seconds, output, ranks = stop(rank, ijepa__run__silence_seconds=silence)
        said = [line for line in output.splitlines() if " leaves (" in line]
        node = socket.gethostname()
        expected = f"s from rank {rank} on {node} (it was "  # in a step, or waiting for a batch
        stopped.figures[f"s until rank {1 - rank} had left"] = round(seconds or -1, 1)
        what = f"{seconds} s, {ranks.exit_codes}\n{ranks.outputs()}"
        if seconds is None:
            stopped.count("hung", what)
        elif any(word in ranks.outputs() for word in ("Traceback", "gloo", "frame #")):
            stopped.count("traceback", what)
        elif len(said) == 1 and expected in said[0] and ranks.exit_codes == [GIVEN_UP, GIVEN_UP]:
            stopped.count("survived")
        else:
            stopped.count("silent", what)
    stopped.hold(2)


def raise_in_the_third_save() -> None:
    """On rank 1, a MemoryError in the thread that writes the third checkpoint."""
    from ijepa_ds.engine import checkpoint_writer

    whole, calls = checkpoint_writer.write_rank_file, []

    def fail(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            raise MemoryError("no memory for a copy")
        return whole(*arguments)

    checkpoint_writer.write_rank_file = fail


def raise_in_the_fifth_step() -> None:
    """On rank 1, an error in step 5."""
    from ijepa_ds.engine.moving_average import MovingAverage

    update, calls = MovingAverage.update, []

    def fail(self, momentum, applied) -> None:
        calls.append(momentum)
        if len(calls) == 5 and os.environ["RANK"] == "1":
            raise ValueError("something is wrong")
        update(self, momentum, applied)

    MovingAverage.update = fail


def read_no_more() -> None:
    """On rank 1, the loader never gets on after its fourth batch."""
    from ijepa_ds.data import ffcv_pipeline

    load, calls = ffcv_pipeline._Traversal.run_pipeline, []

    def stuck(self, *arguments):
        calls.append(arguments)
        if len(calls) > 4 and os.environ["RANK"] == "1":
            self.loading = arguments[1]
            time.sleep(3600)
        return load(self, *arguments)

    ffcv_pipeline._Traversal.run_pipeline = stuck


@pytest.mark.long
@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (raise_in_the_fifth_step, "ValueError: something is wrong"),
        (raise_in_the_third_save, "MemoryError: no memory for a copy"),
    ],
)
def test_an_error_of_one_rank_is_said_once_by_the_other(row, prepare, error) -> None:
    errors = row(f"{error.partition(':')[0]} on one rank")
    with training(attacked_config(error.partition(":")[0], **LONG_RUN), 2, prepare) as ranks:
        ranks.wait_for_an_end()
        seconds = ranks.wait(OLDEST)
    errors.figures["s until the other had left"] = round(seconds or -1, 1)
    own, other = ranks.output(1), ranks.output(0)
    named = [line for line in other.splitlines() if f"rank 1 on {socket.gethostname()}: {error}" in line]
    if seconds is None:
        errors.count("hung", ranks.outputs())
    elif "Traceback" in other or "gloo" in other or own.count("Traceback") != 1:
        errors.count("traceback", ranks.outputs())
    elif len(named) == 1 and ranks.exit_codes == [GIVEN_UP, 1]:
        errors.count("survived")
    else:
        errors.count("silent", f"{ranks.exit_codes}\n{ranks.outputs()}")
    errors.hold(1)


@pytest.mark.long
def test_a_loader_that_is_stuck_is_said_before_it_is_ended(row) -> None:
    loaders = row("a loader stuck in a read on one rank")
    with training(attacked_config("stuck_loader", **LONG_RUN), 2, read_no_more) as ranks:
        ranks.wait_for("s, after step 2; the run ends after 25 s")
        began = time.monotonic()
        ended = ranks.wait(25 + OLDEST)
    loaders.figures["s from the warning to the end"] = round(time.monotonic() - began, 1)
    warned = f"warning: rank 1 on {socket.gethostname()} has been waiting for a batch from {FOLDER}/train.beton for "
    if ended is None:
        loaders.count("hung", ranks.outputs())
    elif warned in ranks.output(0) and ranks.exit_codes == [GIVEN_UP, GIVEN_UP]:
        loaders.count("survived")
    else:
        loaders.count("silent", f"{ranks.exit_codes}\n{ranks.outputs()}")
    loaders.hold(1)
