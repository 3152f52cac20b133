"""run.sh: its help, its sentences for a user's mistakes, its stamp, how it passes on signals. Nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = ("PYTHON", "DEEPSPEED_ARGS", "TENSORBOARD_HOST")
COMMANDS = ["setup", "demo", "test", "lint", "convert", "pretrain", "evaluate", "tensorboard"]


def run(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        arguments, cwd=cwd, env=clean | env, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=1800
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that counts as set up, at a path with a space; ``python`` is the one that runs the tests."""
    clone = tmp_path / "a clone"
    (clone / ".venv/bin").mkdir(parents=True)
    for name in ("run.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, clone / name)
    (clone / ".venv/bin/python").symlink_to(sys.executable)
    written = run("bash", "-c", '. "$0/run.sh"; stamp > "$stamp_file"', clone)
    assert written.returncode == 0, written.stderr
    return clone


def fake_deepspeed(clone: Path, rank: str, launcher: str = "wait") -> None:
    """A launcher that starts one rank: ``rank`` is Python, ``launcher`` what the launcher does meanwhile."""
    (clone / "rank.py").write_text(f"import os, signal, sys, time\nhere = os.path.dirname(sys.argv[0])\n{rank}\n")
    script = clone / ".venv/bin/deepspeed"
    script.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "{clone}/arguments"\n'
        f'python "{clone}/rank.py" --local_rank=0 & rank=$!\n{launcher} $rank\n'
    )
    script.chmod(0o755)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} was never written"
        time.sleep(0.02)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_the_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    parsed = run("bash", "-n", script)
    assert (parsed.returncode, parsed.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_help_has_one_line_for_each_command(arguments: list[str], tmp_path: Path) -> None:
    shown = run(ROOT / "run.sh", *arguments, cwd=tmp_path)
    assert shown.returncode == 0
    assert re.findall(r"^  ([a-z]+) +\S", shown.stdout, re.MULTILINE) == COMMANDS


def test_an_unknown_command_is_one_sentence() -> None:
    refused = run(ROOT / "run.sh", "pretain")
    assert refused.returncode == 2
    assert refused.stderr == "error: unknown command 'pretain'; ./run.sh help lists them\n"


def test_a_python_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    shutil.copy(ROOT / "run.sh", tmp_path)
    for name in ("setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    refused = run(tmp_path / "run.sh", "setup", PYTHON="/bin/false")
    assert refused.returncode == 2
    assert re.fullmatch(r"error: PYTHON=/bin/false is not a working Python 3\.10 to 3\.13;[^\n]*\n", refused.stderr)
    assert not (tmp_path / ".venv").exists()


def test_the_python_found_is_not_the_one_of_an_active_environment(tmp_path: Path) -> None:
    """Setup may delete .venv, so it must not build from .venv's own interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "active"], check=True)
    found = run("bash", "-c", '. ./run.sh; inspect_python "$0"', tmp_path / "active/bin/python")
    assert found.stdout.split()[0] in ("complete", "incomplete")
    assert str(tmp_path) not in found.stdout


def test_missing_system_packages_are_named_with_the_command(tmp_path: Path) -> None:
    for name in ("pkg-config", "sudo"):  # a pkg-config that finds nothing, a sudo that wants a password
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    missing = run("bash", "-c", f". ./run.sh; missing_system_packages complete {sys.executable}", PATH=path)
    assert missing.stdout.split()[-2:] == ["libopencv-dev", "libturbojpeg0-dev"]
    if os.geteuid() != 0 and shutil.which("apt-get"):
        refused = run("bash", "-c", ". ./run.sh; install_system_packages libopencv-dev g++", PATH=path)
        assert refused.returncode == 2
        assert refused.stderr.endswith("sudo apt-get install -y libopencv-dev g++\n")


def test_a_matching_stamp_makes_setup_do_nothing(clone: Path, tmp_path: Path) -> None:
    before = sorted((path, path.lstat().st_mtime_ns) for path in clone.rglob("*"))
    done = run(clone / "run.sh", "setup", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted((path, path.lstat().st_mtime_ns) for path in clone.rglob("*")) == before


def test_tensorboard_listens_to_this_machine_alone_unless_told(clone: Path, tmp_path: Path) -> None:
    script = clone / ".venv/bin/tensorboard"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    plain = run(clone / "run.sh", "tensorboard", cwd=tmp_path)
    assert plain.stdout.split() == ["--host", "127.0.0.1", "--logdir", "runs"], plain.stderr
    opened = run(clone / "run.sh", "tensorboard", "a b", "--port", "1", cwd=tmp_path, TENSORBOARD_HOST="0.0.0.0")
    assert opened.stdout.splitlines() == ["--host", "0.0.0.0", "--logdir", "a b", "--port", "1"]


@pytest.mark.parametrize("change", ["constraints", "path", "interrupted"])
def test_whatever_makes_the_environment_doubtful_breaks_the_stamp(clone: Path, change: str) -> None:
    if change == "constraints":
        with (clone / "constraints.txt").open("a") as constraints:
            constraints.write("# new\n")
    elif change == "path":
        clone = clone.rename(clone.with_name("moved"))
    else:
        (clone / ".venv/setup-unfinished").touch()
    assert run("bash", "-c", '. "$0/run.sh"; is_set_up', clone).returncode == 1


def test_pretrain_hands_over_arguments_and_exit_code(clone: Path, tmp_path: Path) -> None:
    fake_deepspeed(clone, "sys.exit(7)")
    finished = run(clone / "run.sh", "pretrain", "--config", "a b.json", cwd=tmp_path, DEEPSPEED_ARGS="--num_gpus 2")
    assert finished.returncode == 7, finished.stderr
    arguments = (clone / "arguments").read_text().splitlines()
    assert arguments == ["--num_gpus", "2", str(clone / "run.py"), "--config", "a b.json"]


GRACEFUL = """
def leave(number, frame):
    time.sleep(0.5)  # a checkpoint
    open(here + "/saved", "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open(here + "/pid", "w").write(str(os.getpid()))
time.sleep(60)
"""
STUBBORN = """
signal.signal(signal.SIGTERM, lambda *_: open(here + "/asked", "a").write("asked"))
open(here + "/pid", "w").write(str(os.getpid()))
while True:
    time.sleep(1)
"""


def start_pretrain(clone: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [clone / "run.sh", "pretrain"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return process, int(wait_for(clone / "pid"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_the_ranks_save_before_anything_ends(clone: Path, number: signal.Signals) -> None:
    fake_deepspeed(clone, GRACEFUL)
    process, rank = start_pretrain(clone)
    process.send_signal(number)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output  # the launcher's own exit code: the signal never reached it
    assert (clone / "saved").exists()
    assert not is_alive(rank)


def test_a_second_interrupt_kills_ranks_that_do_not_leave(clone: Path) -> None:
    fake_deepspeed(clone, STUBBORN)
    process, rank = start_pretrain(clone)
    process.send_signal(signal.SIGINT)
    wait_for(clone / "asked")
    assert is_alive(rank)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=1800)
    assert process.returncode == 128 + signal.SIGKILL
    assert not is_alive(rank)


def test_no_rank_outlives_its_launcher(clone: Path) -> None:
    fake_deepspeed(clone, GRACEFUL, launcher=f"until [ -s '{clone}/pid' ]; do sleep 0.1; done; kill -KILL $$ #")
    process, rank = start_pretrain(clone)
    process.communicate(timeout=1800)
    assert process.returncode == 128 + signal.SIGKILL
    assert (clone / "saved").exists()
    assert not is_alive(rank)


@pytest.mark.parametrize(("failing", "status"), [("none", 0), ("check", 1), ("format", 1), ("mypy", 1)])
def test_lint_asks_all_three_and_fails_where_any_does(clone: Path, failing: str, status: int) -> None:
    calls = clone / "calls"
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").write_text(
        f'#!/usr/bin/env bash\n[[ $1 == -m ]] || exec "{sys.executable}" "$@"\n'
        f'echo "$*" >> "{calls}"\n[[ "$*" != *{failing}* ]]\n'
    )
    (clone / ".venv/bin/python").chmod(0o755)
    assert run("bash", "-c", '. "$0/run.sh"; stamp > "$stamp_file"; main lint', clone).returncode == status
    assert calls.read_text().splitlines() == ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
