"""Checkpoints that are written while training goes on, here in this process."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest
import torch

from ijepa_ds.distributed import Process
from ijepa_ds.engine import checkpoint_writer, rank_files
from ijepa_ds.engine.checkpoint_files import list_checkpoints, read_weights
from ijepa_ds.engine.shards import Placement, Shard
from ijepa_ds.engine.trainable import Outcome, State
from ijepa_ds.errors import UserError
from ijepa_ds.run.saving import Saver
from ijepa_ds.settings import CheckpointConfig

ALONE = Process(0, 1, torch.device("cpu"))
FINE = Outcome(torch.tensor([0.5]), torch.tensor(True), torch.tensor(1.0))


class Training:
    """A state of five weights, which a step changes, and a saver of it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        shard = Shard("group", (Placement("a", 0, torch.Size([5])),), 0, 5, None)
        self.weights = torch.zeros(5)
        kinds = ("master", "exp_avg", "exp_avg_sq", "target")
        self.steps = torch.zeros(())
        self.state = State({kind: [(shard, self.weights)] for kind in kinds}, {"group": [self.steps]}, True, "zero")
        self.said: list[str] = []
        checkpoint = CheckpointConfig(**settings)
        self.saver = Saver(folder, checkpoint, ALONE, steps_per_epoch=10, say=self.said.append)

    def step(self) -> None:
        self.weights += 1
        self.steps += 1
        self.saver.hear(self.saver.busy, delay=0)


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """A disk that has nothing before it is told to."""
    go_on, write = threading.Event(), checkpoint_writer.write_rank_file

    def wait_and_write(*arguments):
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_rank_file", wait_and_write)
    yield go_on
    go_on.set()


def until(condition, training: Training) -> None:
    end = 1000
    while not condition() and (end := end - 1):
        training.step()
        threading.Event().wait(0.005)
    assert condition()


def test_training_goes_on_and_what_is_written_is_what_was_there(tmp_path, slow_disk):
    training = Training(tmp_path)
    training.step()
    training.saver.save(1, training.state, FINE)
    for _ in range(3):
        training.step()
    assert training.saver.busy and training.saver.saved_step == -1 and not training.said
    assert not list_checkpoints(tmp_path)
    slow_disk.set()
    until(lambda: training.saver.saved_step == 1, training)
    (path,) = list_checkpoints(tmp_path)
    assert read_weights(path, "master")["a"].tolist() == [1.0] * 5
    assert training.said[0].startswith(f"saved {path} in ") and "of which training waited" in training.said[0]


def test_only_one_is_written_at_a_time_and_the_next_waits_for_it(tmp_path, slow_disk):
    training = Training(tmp_path, keep=5)
    training.saver.save(0, training.state, FINE)
    training.step()
    threading.Timer(0.2, slow_disk.set).start()
    training.saver.save(1, training.state, FINE)
    assert training.saver.saved_step == 0
    training.saver.finish()
    assert [read_weights(path, "target")["a"][0].item() for path in list_checkpoints(tmp_path)] == [0.0, 1.0]


def test_beside_training_one_thread_sums_and_else_all(tmp_path, monkeypatch):
    training, threads, write = Training(tmp_path), [], checkpoint_writer.write_rank_file

    def note_and_write(*arguments):
        threads.append(rank_files.CRC_THREADS.get())
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_rank_file", note_and_write)
    training.step()
    training.saver.save(1, training.state, FINE)
    training.saver.finish()
    training.saver.save(2, training.state, FINE, wait=True)
    assert threads == [1, 4]


def test_a_save_that_is_to_be_waited_for_is(tmp_path):
    training = Training(tmp_path)
    training.saver.save(3, training.state, FINE, wait=True)
    assert training.saver.saved_step == 3 and not training.saver.busy


@pytest.mark.parametrize("way", ["background off", "no memory"])
def test_without_a_copy_training_waits_until_it_is_written(way, tmp_path, monkeypatch):
    if way == "no memory":
        nothing = type("Memory", (), {"available": 0})
        monkeypatch.setattr(psutil, "virtual_memory", nothing)
    training = Training(tmp_path, background=way == "no memory")
    training.saver.save(2, training.state, FINE)
    assert not training.saver.busy
    training.step()  # may change the state at once
    training.saver.finish()
    assert read_weights(list_checkpoints(tmp_path)[0], "master")["a"].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("outcome", "saved"),
    [
        (Outcome(torch.tensor([0.5, float("nan")]), torch.tensor(True), None), False),
        (Outcome(torch.tensor([0.5]), torch.tensor(True), torch.tensor(float("inf"))), False),
        (Outcome(torch.tensor([float("nan")]), torch.tensor(False), torch.tensor(float("nan"))), True),  # nothing moved
        (None, True),
    ],
)
def test_an_update_that_was_not_finite_is_not_saved(outcome, saved, tmp_path):
    training = Training(tmp_path)
    training.saver.save(4, training.state, outcome)
    training.saver.finish()
    assert len(list_checkpoints(tmp_path)) == saved and training.saver.tried_step == 4
    assert saved or training.said == [
        "step 4 is not saved: its loss or gradient is not finite; what was saved before stays"
    ]


def test_a_full_disk_ends_the_run_a_step_later(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_rank_file", full)
    training = Training(tmp_path)
    training.saver.save(4, training.state, FINE)
    with pytest.raises(UserError, match=r"step 4 could not be written .*No space left on device.*free some space"):
        until(lambda: False, training)
    assert not list(tmp_path.iterdir())
