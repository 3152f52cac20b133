"""Every signal to every process of a run: nobody stays behind, and what is saved is whole."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from attacked_runs import OLDEST, attacked_config
from distributed_runs import (
    FOLDER,
    ROOT,
    checkpoint_tensors,
    command_environment,
    free_port,
    run_folder,
    train_beton,
    write_config,
)

from ijepa_ds.engine.checkpoint_files import list_checkpoints
from ijepa_ds.run.heartbeat import GIVEN_UP
from ijepa_ds.run.launchers import program_of

SIGNALS = ("SIGKILL", "SIGUSR1", "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
TARGETS = ("deepspeed", "launcher", "rank 0", "rank 1", "run.sh")

CHILD = """
import os, signal, sys, time
from ijepa_ds.run import launchers
launchers.watch_launchers()
def leave(number, frame):
    with open(sys.argv[1] + "/left", "w") as file:
        file.write(str(launchers.ended()))
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
with open(sys.argv[1] + "/ready", "w") as file:
    file.write("ready")
time.sleep(60)
"""
STARTER = "import subprocess, sys; subprocess.Popen([sys.executable, sys.argv[1], sys.argv[2]]).wait()"


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["/venv/bin/python", "/venv/bin/deepspeed", "run.py"], "deepspeed"),
        (["/venv/bin/python3.11", "-u", "-m", "deepspeed.launcher.launch", "--x"], "deepspeed.launcher.launch"),
        (["slurmstepd: [1234.0]"], "slurmstepd"),
        (["/usr/bin/mpirun", "-n", "2", "python", "run.py"], "mpirun"),
        (["bash", "-c", "deepspeed run.py"], "bash"),
        (["nano", "deepspeed"], "nano"),
        ([], ""),
    ],
)
def test_what_a_command_line_starts(command, program) -> None:
    assert program_of(command) == program


def appears(path: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return path.exists()


@pytest.mark.parametrize(("program", "leaves"), [("deepspeed", True), ("my_job.py", False)])
def test_a_process_leaves_when_a_launcher_has_ended_but_no_other_parent(tmp_path, program, leaves) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / program).write_text(STARTER)
    command = [sys.executable, str(tmp_path / program), str(tmp_path / "child.py"), str(tmp_path)]
    parent = subprocess.Popen(command, env=command_environment(), start_new_session=True)
    try:
        assert appears(tmp_path / "ready", 60)
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        assert appears(tmp_path / "left", 20 if leaves else 2) == leaves
        assert not leaves or (tmp_path / "left").read_text() == "True"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    child.wait(10)


class Launched:
    """A run of two ranks as an operator starts it: with ``deepspeed``, or with what ``./run.sh pretrain`` does."""

    def __init__(self, name: str, *, by_script: bool) -> None:
        train_beton()
        self.config = attacked_config(name, ijepa__optimization__epochs=500, ijepa__checkpoint__steps=0)
        self.file = FOLDER / f"launched_{name}"
        port, config = str(free_port()), str(write_config(self.config))
        command = ["deepspeed", "--num_gpus", "2", "--master_port", port, str(ROOT / "run.py"), "--config", config]
        if by_script:
            quoted = shlex.join(command)
            command = ["bash", "-c", f". {ROOT}/run.sh; export IJEPA_STARTER=$$; run_group {quoted}"]
        with self.file.open("w") as output:
            self.top = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**command_environment(), "IJEPA_DS_TESTS": str(FOLDER)},
                cwd=FOLDER,
                start_new_session=True,
            )
        self.processes: dict[str, psutil.Process] = {}

    def wait_until_it_trains(self) -> None:
        """Until some steps are done, and note who is there."""
        end = time.monotonic() + 300
        while " 3/2000" not in self.output():
            assert time.monotonic() < end and self.top.poll() is None, self.output()[-2000:]
            time.sleep(0.05)
        for process in (psutil.Process(self.top.pid), *psutil.Process(self.top.pid).children(recursive=True)):
            words = process.cmdline()
            if any(word.startswith("--local_rank=") for word in words) and str(ROOT / "run.py") in words:
                self.processes.setdefault(f"rank {process.environ()['RANK']}", process)
            elif "deepspeed.launcher.launch" in words:
                self.processes["launcher"] = process
            elif any(Path(word).name == "deepspeed" for word in words[:2]):
                self.processes["deepspeed"] = process
            elif process.pid == self.top.pid:
                self.processes["run.sh"] = process

    def wait(self) -> float | None:
        """Seconds until all have ended, None where one is too old."""
        began = time.monotonic()
        while any(is_there(process) for process in self.processes.values()):
            self.top.poll()
            if time.monotonic() - began > OLDEST:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def output(self) -> str:
        """What all have printed."""
        return self.file.read_text()

    def end(self) -> None:
        """Leave nobody behind."""
        for process in self.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.top.pid, signal.SIGKILL)
        self.top.wait()


def is_there(process: psutil.Process) -> bool:
    """Zombies are not: in many containers nobody collects them."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def left_alone(target: str, name: str) -> bool:
    """Whether all ranks live on without something that started them, as DeepSpeed's launcher hands on two signals."""
    handed_on = target == "launcher" and name in ("SIGINT", "SIGTERM")
    by_script = target == "run.sh" and name != "SIGKILL"
    return target in ("deepspeed", "launcher", "run.sh") and not (handed_on or by_script)


def attack(target: str, name: str) -> tuple[str, str, float]:
    """(outcome, what happened, seconds until all had left)."""
    run = Launched(f"{target} {name}".replace(" ", "_"), by_script=target == "run.sh")
    try:
        run.wait_until_it_trains()
        assert len(run.processes) == 4 + (target == "run.sh"), run.processes
        run.processes[target].send_signal(getattr(signal, name))
        if (target, name) == ("run.sh", "SIGQUIT"):  # which every bash ignores
            time.sleep(5)
            alive = all(map(is_there, run.processes.values()))
            return "survived" if alive else "lost", f"{name} to {target}:\n{run.output()[-3000:]}", 0.0
        seconds = run.wait()
    finally:
        run.end()
    output = run.output()
    what = f"{name} to {target}, {seconds} s, {run.top.returncode}:\n{output[-3000:]}"
    if seconds is None:
        return "hung", what, OLDEST
    checkpoints = list_checkpoints(run_folder(run.config) / "checkpoints")
    killed_rank = target.startswith("rank") and name in ("SIGKILL", "SIGQUIT")
    if not killed_rank and (len(checkpoints) != 1 or "stopped by" not in output):
        return "lost", what, seconds
    for checkpoint in checkpoints:
        checkpoint_tensors(run_folder(run.config), int(checkpoint.name.removeprefix("step_")))
    if any(word in output for word in ("gloo", "frame #", 'ijepa_ds/train.py", line')):  # launchers have tracebacks
        return "traceback", what, seconds
    if left_alone(target, name) and "has ended: its processes save and leave" not in output:
        return "silent", what, seconds
    if left_alone(target, name) and target == "deepspeed" and f"return code = {GIVEN_UP}" not in output:
        return "silent", what, seconds
    return "survived", what, seconds


@pytest.mark.long
def test_every_signal_to_every_process(row) -> None:
    signals, longest = row("every signal to every process of a run of two ranks"), 0.0
    for name in SIGNALS:
        for target in TARGETS:
            outcome, what, seconds = attack(target, name)
            longest = max(longest, seconds)
            signals.figures["longest s until all had left"] = round(longest, 1)
            signals.count(outcome, what)
            signals.record()
            print(outcome, what.partition("\n")[0], flush=True)
    signals.hold(len(SIGNALS) * len(TARGETS))
