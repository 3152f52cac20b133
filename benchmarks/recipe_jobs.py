"""The jobs of ``recipes.py``: a run is trained, then evaluated, so many side by side; what is finished stays so."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import measure

from ijepa_ds.errors import listing
from ijepa_ds.files import checksum, replacing
from ijepa_ds.progress import duration
from ijepa_ds.run.launchers import STARTER
from ijepa_ds.run.stop import StopRequest
from ijepa_ds.validation import Checked, read_json

Phase = Literal["training", "evaluation"]
TAIL_LINES = 20  # of a failed job's log, that are shown
POLL_SECONDS = 0.1
_STEP = re.compile(r"^step +(\d+)/(\d+)(?:.* ([\d.]+) img/s)?(?:.* left (.+))?")
_DONE = re.compile(r"^done: \d+ steps", re.MULTILINE)  # what a run says after its last step


class Record(Checked):
    """What a job has finished: the settings that it was trained with, the options that it was evaluated with."""

    trained: list[str] | None = None
    evaluated: list[str] | None = None


@dataclass(frozen=True)
class Commands:
    """How a job's two programs begin; others in tests."""

    train: Sequence[str] = (sys.executable, str(measure.ROOT / "run.py"))
    evaluate: Sequence[str] = (sys.executable, "-m", "ijepa_ds", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with a seed, and where it is kept."""

    recipe: str
    seed: int
    config: Path
    settings: list[str]
    evaluation: list[str]
    folder: Path

    @property
    def name(self) -> str:
        """The run's, in the folder."""
        return f"{self.recipe}_seed{self.seed}"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """What its programs have said, of all attempts."""
        return self.folder / "jobs" / f"{self.name}.log"

    @property
    def results(self) -> Path:
        """What its evaluation writes."""
        return self.run / "evaluation" / "results.json"

    def next_phase(self) -> Phase:
        """Whose turn it is."""
        return "evaluation" if self.is_trained() else "training"

    def identity(self) -> list[str]:
        """What decides how the run comes out: other settings make another run."""
        return [f"config sha256 {checksum(self.config)}", *self.settings]

    def record(self) -> Record:
        """What is finished."""
        path = self._record_path()
        return read_json(Record, path, "is not what this benchmark writes") if path.is_file() else Record()

    def note(self, record: Record) -> None:
        """Keep what is finished."""
        with replacing(self._record_path()) as unfinished:
            unfinished.write_text(record.model_dump_json() + "\n")

    def is_trained(self) -> bool:
        """Whether the run has all its steps."""
        return self.record().trained == self.identity()

    def is_evaluated(self) -> bool:
        """Whether its results are there, with today's options."""
        return self.is_trained() and self.record().evaluated == self.evaluation and self.results.is_file()

    def next_command(self, commands: Commands) -> list[str]:
        """What is to be run next; nothing where all is finished."""
        if not self.is_trained():
            own = [f"ijepa.run.folder={self.folder.absolute()}", f"ijepa.run.name={self.name}"]
            sets = [part for setting in [*self.settings, *own] for part in ("--set", setting)]
            return [*commands.train, "--config", str(self.config), *sets]
        if not self.is_evaluated():
            output = ["--out", str(self.results.parent), "--no-pictures"]
            return [*commands.evaluate, "--checkpoint", str(self.run), *output, *self.evaluation]
        return []

    def _record_path(self) -> Path:
        return self.folder / "jobs" / f"{self.name}.json"


@dataclass
class Running:
    """A program of a job under way."""

    job: Job
    phase: Phase
    process: subprocess.Popen[bytes]
    log_start: int  # bytes of the log that were there before

    def said(self) -> str:
        """What the program has printed."""
        with open(self.job.log, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace").replace("\r", "\n")

    def finished(self) -> bool:
        """Whether the program, which has ended, has done all it had to do; it can also have been asked to stop."""
        if self.process.returncode != 0:
            return False
        if self.phase == "training":
            return _DONE.search(self.said()) is not None
        return self.job.results.is_file()

    def progress(self) -> str:
        """A line on how far it is."""
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        for line in reversed(lines) if self.phase == "training" else ():
            if match := _STEP.match(line):
                step, steps, rate, left = match.groups()
                more = [f"{rate} images/s"] * (rate is not None) + [f"{left} left"] * (left is not None)
                return f"{self.job.name}: " + ", ".join([f"step {step} of {steps}", *more])
        return f"{self.job.name}: {self.phase}" + (f": {lines[-1][:100]}" if lines else "")


@dataclass
class Bench:
    """Runs jobs, so many at a time, until all are finished, have failed, or a signal asks to stop.

    ``finished`` is called whenever a job is. Nothing is started after the stop was asked for.
    """

    jobs: list[Job]
    commands: Commands
    at_once: int = 1
    every: float = 60.0  # seconds between lines on the progress
    finished: Callable[[], object] = lambda: None
    running: list[Running] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    done: int = 0
    stopping: bool = False

    def run(self) -> bool:
        """Run them; whether all are finished."""
        waiting = [job for job in self.jobs if job.next_command(self.commands)]
        self.done = done_before = len(self.jobs) - len(waiting)
        say(f"{self.done} of {len(self.jobs)} jobs are finished, {len(waiting)} to do, {self.at_once} at a time")
        began = shown = time.monotonic()
        stop = StopRequest()
        try:
            while self.running or (waiting and not self.stopping):
                if stop.requested and not self.stopping:
                    self.ask_to_stop(stop.requested)
                while waiting and len(self.running) < self.at_once and not self.stopping:
                    self.start(waiting.pop(0))
                self.reap()
                if time.monotonic() - shown >= self.every:
                    shown = time.monotonic()
                    self.show(shown - began, self.done - done_before)
                time.sleep(POLL_SECONDS)
        finally:
            for running in self.running:  # a second Ctrl-C
                running.process.kill()
                running.process.wait()
            stop.restore()
        return self.done == len(self.jobs)

    def ask_to_stop(self, signal_name: str) -> None:
        """Have each training save and end, each evaluation end."""
        self.stopping = True
        say(f"{signal_name}: the programs are asked to stop; the same command goes on")
        for running in self.running:
            running.process.terminate()

    def start(self, job: Job) -> None:
        """Start the next program of a job that has one."""
        command, phase = job.next_command(self.commands), job.next_phase()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,  # a Ctrl-C reaches this process alone, which asks them once
            )
        say(f"{job.name}: {phase} begins; log: {job.log}")
        self.running.append(Running(job, phase, process, begin))

    def reap(self) -> None:
        """Note what the programs that have ended have done, and start their jobs' next ones."""
        for running in [running for running in self.running if running.process.poll() is not None]:
            self.running.remove(running)
            if running.finished():
                self.note(running)
            elif self.stopping:
                say(f"{running.job.name}: its {running.phase} has stopped")
            else:
                self.fail(running)

    def note(self, running: Running) -> None:
        """Keep what is done; the job's evaluation follows its training at once."""
        job = running.job
        job.note(Record(trained=job.identity(), evaluated=job.evaluation if running.phase == "evaluation" else None))
        if not job.next_command(self.commands):
            self.done += 1
            say(f"{job.name} is finished: {self.done} of {len(self.jobs)}")
            self.finished()
        elif not self.stopping:
            self.start(job)

    def fail(self, running: Running) -> None:
        """Report a program that has not done what it had to; the other jobs go on."""
        job, code = running.job, running.process.returncode
        why = f"exit code {code}" if code else "it ended before it was done"
        tail = [line for line in running.said().splitlines() if line.strip()][-TAIL_LINES:]
        self.failed.append(job.name)
        say(f"{job.name} FAILED in its {running.phase} ({why}); the end of {job.log}:{listing(tail)}")

    def show(self, seconds: float, finished: int) -> None:
        """Say how far everything is; ``finished``: jobs in these seconds."""
        left = ""
        if finished:
            rest = len(self.jobs) - self.done - len(self.failed)
            left = f", about {duration(seconds / finished * rest)} left"
        say(f"{self.done} of {len(self.jobs)} jobs are finished{left}")
        for running in self.running:
            say(f"  {running.progress()}")


def environment() -> dict[str, str]:
    """Of the programs: one thread each; a training ends when this process is gone, however that ended."""
    paths = [str(measure.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths), STARTER: str(os.getpid())}


def say(line: str) -> None:
    """Print with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
