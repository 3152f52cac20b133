"""Commands in a process group of their own: exit codes, signals, nothing that outlives them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ijepa_ds.commands import Commands

GRACEFUL = """
import os, signal, sys, time
def leave(number, frame):
    open("saved", "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open("pid", "w").write(str(os.getpid()))
time.sleep(600)
"""
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: open("asked", "w").write("asked"))
open("pid", "w").write(str(os.getpid()))
while True:
    time.sleep(1)
"""
LEAVES_A_CHILD = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("pid", "w").write(str(child.pid))
"""


def wait_for(path: Path) -> str:
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def meanwhile(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_command_runs_in_the_folder_and_gives_its_exit_code(tmp_path: Path) -> None:
    with Commands(tmp_path, {**os.environ, "VALUE": "there"}) as commands:
        assert commands.run([sys.executable, "-c", "import os; open('value', 'w').write(os.environ['VALUE'])"]) == 0
        assert commands.run([sys.executable, "-c", "raise SystemExit(7)"]) == 7
        assert commands.stopped is None
    assert (tmp_path / "value").read_text() == "there"


@pytest.mark.parametrize("number", Commands.SIGNALS)
def test_any_signal_asks_the_command_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Commands(tmp_path, os.environ) as commands:
        thread = meanwhile(lambda: (wait_for(tmp_path / "pid"), os.kill(os.getpid(), number)))
        assert commands.run([sys.executable, "-c", GRACEFUL]) == 0
        thread.join()
        assert commands.stopped == number
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(number) == before


def test_a_second_interrupt_kills_what_does_not_stop(tmp_path: Path) -> None:
    def interrupt_twice() -> None:
        wait_for(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(tmp_path / "asked")
        os.kill(os.getpid(), signal.SIGINT)

    with Commands(tmp_path, os.environ) as commands:
        thread = meanwhile(interrupt_twice)
        assert commands.run([sys.executable, "-c", STUBBORN]) == -signal.SIGKILL
        thread.join()


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    with Commands(tmp_path, os.environ) as commands:
        assert commands.run([sys.executable, "-c", LEAVES_A_CHILD]) == 0
    child = int(wait_for(tmp_path / "pid"))
    while is_alive(child):
        time.sleep(0.01)


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Commands(tmp_path, os.environ) as commands:
            os.kill(os.getpid(), signal.SIGHUP)
            assert commands.stopped is None
    finally:
        signal.signal(signal.SIGHUP, before)
