"""The log of a run: what is written, what a resume takes back, and that a failing disk stops nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading

import numpy as np
import pytest

from ijepa_ds.errors import UserError
from ijepa_ds.progress import duration
from ijepa_ds.run import metrics_file
from ijepa_ds.run.meter import Meter
from ijepa_ds.run.monitor import Monitor, _hide_full_disks_of_tensorboard, scalar_tag


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def start(folder, **changes) -> Monitor:
    return Monitor(folder, **{"enabled": True, "total_steps": 1000, "images_per_step": 64, **changes})


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensorboard(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()


def test_a_step_is_one_line_of_json_even_when_logged_in_two_calls(tmp_path):
    monitor = start(tmp_path)
    monitor.scalars(10, {"loss": 0.5, "grad_norm": math.inf})
    monitor.scalars(10, {"rankme": math.nan}, console=False)
    monitor.scalars(20, {"loss": 0.25})
    monitor.close()
    first, second = lines(tmp_path)
    assert first.pop("time") > 1e9
    assert first == {"step": 10, "loss": 0.5, "grad_norm": None, "rankme": None}
    assert (second["step"], second["loss"]) == (20, 0.25)


def test_tensorboard_gets_grouped_tags_pictures_and_text(tmp_path):
    monitor = start(tmp_path)
    monitor.scalars(10, {"loss": 0.5, "lr": 1e-3, "knn/top1": 40.0, "extra": 1.0}, console=False)
    monitor.picture(10, "masks", np.zeros((8, 12, 3), np.uint8))
    monitor.text("config", "# a run")
    monitor.close()
    events = tensorboard(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "schedule/lr", "knn/top1", "train/extra"}
    assert events.Tags()["images"] == ["pictures/masks"]
    assert "config/text_summary" in events.Tags()["tensors"]
    assert (tmp_path / "pictures" / "masks_00000010.png").read_bytes().startswith(b"\x89PNG")


def test_a_resume_takes_back_the_steps_after_it(tmp_path):
    monitor = start(tmp_path)
    for step in (10, 20, 30):
        monitor.scalars(step, {"loss": float(step)}, console=False)
    monitor.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')  # the process was killed here

    monitor = start(tmp_path, start_step=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    monitor.scalars(30, {"loss": -1.0}, console=False)
    monitor.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert [(s.step, s.value) for s in tensorboard(tmp_path).Scalars("train/loss")] == [(10, 10), (20, 20), (30, -1)]
    assert not list(tmp_path.glob("metrics.jsonl?*"))


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    monitor = start(tmp_path / "run", enabled=False)
    monitor.scalars(1, {"loss": 1.0})
    monitor.picture(1, "masks", np.zeros((2, 2, 3), np.uint8))
    monitor.text("config", "x")
    monitor.say("x")
    monitor.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_importing_the_monitor_does_not_import_tensorboard():
    code = "import sys, ijepa_ds.run.monitor; sys.exit(any('tensorboard' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_console_line(tmp_path, capsys):
    clock = Clock()
    monitor = start(tmp_path, total_steps=375000, clock=clock)
    values = {
        "loss": 0.22134, "epoch": 2.314, "lr": 6.1e-4, "weight_decay": 0.0412, "momentum": 0.996123,
        "grad_norm": 0.3141, "images_per_second": 1834.2, "step_seconds": 1.1, "loader_wait": 0.012, "tflops": 154.3,
        "peak_share": 0.5938,
        "memory_gb": 18.2, "knn/top1": 41.25,
    }  # fmt: skip
    monitor.scalars(1190, values)
    clock.wait(2.5)
    monitor.scalars(1200, values)
    first, second = capsys.readouterr().out.splitlines()
    assert "left" not in first
    assert second == (
        "step   1200/375000  epoch 2.31  loss 0.2213  lr 6.1e-04  wd 0.041  ema 0.99612  |g| 0.31  1834 img/s"
        "  154 TFLOP/s  59% of peak  wait 1%  18.2 GB  knn/top1 41.25  left 1d 01h 57m"
    )


def test_time_left_ignores_compilation_and_a_pause(tmp_path):
    clock = Clock()
    monitor = start(tmp_path, clock=clock)
    clock.wait(300)  # compilation
    monitor.scalars(10, {"loss": 1.0}, console=False)
    assert monitor.seconds_left(10) is None
    for step, seconds in ((20, 5), (30, 5), (40, 600), (50, 5)):  # a checkpoint before step 40
        clock.wait(seconds)
        monitor.scalars(step, {"loss": 1.0}, console=False)
        monitor.scalars(step, {"rankme": 1.0}, console=False)  # the same step again is no interval
    assert monitor.seconds_left(50) == pytest.approx(0.5 * 950)
    assert monitor.seconds_left(2000) == 0


def test_a_value_that_is_not_finite_can_be_printed(tmp_path, capsys):
    start(tmp_path).scalars(1, {"loss": math.nan, "grad_norm": math.inf, "loader_wait": math.nan})
    assert "loss nan  |g| inf  wait nan%" in capsys.readouterr().out


def test_a_full_disk_is_said_once_and_the_log_goes_on_when_there_is_room(tmp_path, monkeypatch, capsys):
    monitor = start(tmp_path)
    monitor.scalars(1, {"loss": 1.0})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(metrics_file.os, "open", full)
        broken.setattr(monitor._writer, "add_scalar", full)
        for step in (2, 3):
            monitor.scalars(step, {"loss": 1.0})
        monitor.picture(3, "masks", np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "lo')  # what a write that failed half way leaves
    monitor.scalars(4, {"loss": 1.0})
    monitor.close()
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "No space left on device" in output.err
    assert output.out.count("step") == 4
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]


def test_a_full_disk_below_tensorboard_s_thread_is_no_traceback(tmp_path, monkeypatch, capsys):
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)  # pytest's own would hide it
    _hide_full_disks_of_tensorboard.cache_clear()
    monitor = start(tmp_path)
    _hide_full_disks_of_tensorboard.cache_clear()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    asynchronous = monitor._writer._get_file_writer().event_writer._async_writer
    monkeypatch.setattr(asynchronous._writer, "write", full)
    monitor.scalars(1, {"loss": 1.0})
    asynchronous._worker.join(10)
    assert not asynchronous._worker.is_alive()
    for step in (2, 3):
        monitor.scalars(step, {"loss": 1.0})
    monitor.close()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "warning: the run's log" in error and "No space left" in error
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert not reported
    other = threading.Thread(target=full)
    other.start()
    other.join()
    assert len(reported) == 1  # what is not TensorBoard's is not hidden


def test_a_log_file_that_was_removed_starts_again(tmp_path):
    monitor = start(tmp_path)
    monitor.scalars(1, {"loss": 1.0}, console=False)
    (tmp_path / "metrics.jsonl").unlink()
    monitor.scalars(2, {"loss": 1.0}, console=False)
    monitor.scalars(3, {"loss": 1.0}, console=False)
    assert [line["step"] for line in lines(tmp_path)] == [2, 3]


def test_a_folder_that_cannot_be_made_is_a_user_s_mistake(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the run's log in .*taken"):
        start(tmp_path / "taken")


def test_meter_shares_out_the_time_of_a_window():
    clock, processor = Clock(), Clock()
    meter = Meter(images_per_step=8, clock=clock, processor_clock=processor)

    def loader():
        for _ in range(5):
            clock.wait(1)
            yield "batch"

    assert meter.read() == {}
    readings = []
    for step, _batch in enumerate(meter.watch(loader())):
        clock.wait(50 if step == 0 else 3)  # the first step compiles
        processor.wait(50 if step == 0 else 6)  # two threads
        meter.step_done()
        if step == 2:
            with meter.pause():
                clock.wait(1000)  # a checkpoint
                processor.wait(10)
        readings.append(meter.read() if step in (2, 4) else None)
    expected = {"images_per_second": 2.0, "step_seconds": 4.0, "processor_seconds": 6.0, "loader_wait": 0.25}
    assert readings[2] == expected and readings[4] == expected
    assert meter.read() == {}


def test_meter_says_what_share_of_the_peak_a_window_has_computed():
    clock = Clock()
    meter = Meter(images_per_step=8, peak_flops=4e12, clock=clock, processor_clock=clock)
    for step in range(3):
        for _micro_batch in range(2):
            meter.computes(5e12)
        clock.wait(100 if step == 0 else 5)  # the first step compiles, and does not count
        meter.step_done()
    assert meter.read() == {
        "images_per_second": 1.6, "step_seconds": 5.0, "processor_seconds": 5.0, "loader_wait": 0.0, "tflops": 2.0,
        "peak_share": 0.5,
    }  # fmt: skip
    clock.wait(5)
    meter.step_done()
    assert "tflops" not in meter.read()  # nobody said what was computed


def test_names_have_tags():
    assert scalar_tag("loss") == "train/loss" and scalar_tag("knn/top1") == "knn/top1" and scalar_tag("x") == "train/x"


def test_durations_read_well():
    assert [duration(s) for s in (0, 61, 7260, 93_600 + 600, 86_400 * 12)] == [
        "00m 00s", "01m 01s", "02h 01m", "1d 02h 10m", "12d 00h 00m",
    ]  # fmt: skip
    assert duration(math.inf) == duration(math.nan) == "?"
