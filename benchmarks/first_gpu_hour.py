"""Everything that only a GPU can tell, in one command of at most ten minutes: right, fast, and as predicted?

    python benchmarks/first_gpu_hour.py --json OUT.json               # on the GPU
    python benchmarks/first_gpu_hour.py --device cpu --tiny           # the rehearsal, anywhere
    python benchmarks/first_gpu_hour.py --sections canary attention   # some of it; --images FILE.beton: real images

Compared are: fp32 with the CPU, a step with a NaN gradient with no step, DeepSpeed's engine in every arrangement with
plain torch over 200 steps, a resume with no interruption; memory with its prediction; steps eager, compiled and of the
method written plainly; attention's back ends; the loader over its threads; a run before and after kill -9.

Each section is a process of its own with a share of the time: an error, a crash of the device or the end of its share
ends that section alone, and what it has found stays. Sections for which no time is left are named. The file is written
anew after each section. The table comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
from gpu_findings import HEADER, Context, Finding, load_findings

LEAST = 15.0  # seconds: a section with less is not begun
GRACE = 3.0  # a section leaves by itself so much before it is ended
TINY_PATIENCE = 10  # a rehearsal may run on a slow machine
DONE, SKIPPED, OUT_OF_TIME = "done", "skipped: no time was left", "out of time: what it had found by then is kept"


@dataclass(frozen=True)
class Section:
    """A function ``name`` of ``module``, with its argument if it takes one, and the most seconds it gets."""

    name: str
    module: str
    function: str
    seconds: float
    argument: str | None = None


# In the order of what is most worth knowing. Together they may ask for more than there is: the last ones then wait.
SECTIONS = [
    Section("device", "gpu_speed", "device", 45),
    Section("correctness", "gpu_checks", "correctness", 50),
    Section("host_reads", "gpu_checks", "host_reads", 60),
    Section("vits16", "gpu_speed", "model", 90, "vits16_single_gpu"),
    Section("vith14", "gpu_speed", "model", 150, "vith14"),
    Section("canary", "gpu_checks", "canary", 110),
    Section("attention", "gpu_speed", "attention", 25),
    Section("kill", "gpu_checks", "kill", 60),
    Section("loader", "gpu_speed", "loader", 40),
    Section("vitb16", "gpu_speed", "model", 60, "vitb16"),
    Section("vitl16", "gpu_speed", "model", 90, "vitl16"),
]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the sections, print the table, return the record."""
    options = parse(arguments)
    if options.run:
        run_section(options)
        return {}
    print(measure.first_paragraph(__doc__), flush=True)
    with tempfile.TemporaryDirectory(prefix="first_gpu_hour_") as folder:
        return run_all(options, Path(folder))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Which sections, where, for how long."""
    parser = measure.parser(__doc__)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--minutes", type=float, help="of the whole (default: 9.3; a rehearsal: 60)")
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--images", type=Path, help="a .beton file (default: scenes rendered for the occasion)")
    parser.add_argument("--run", choices=names, help=argparse.SUPPRESS)  # a section, in the process that is its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (60 if options.tiny else 9.3)
    return options


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each section in turn while there is time; the record, written after each."""
    began = time.monotonic()
    findings: list[Finding] = []
    statuses: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    for worker in workers_of(options, folder):
        ended = statuses[worker.name] = worker.run(60 * options.minutes - (time.monotonic() - began))
        findings += load_findings(folder / f"{worker.name}.json")
        if ended["status"] != DONE:
            findings.append(Finding(worker.name, "the section", ended["status"], DONE, _verdict(ended["status"])))
        found = {"sections": statuses, "findings": [asdict(finding) for finding in findings]}
        result = measure.record(found, compared=__doc__, device=options.device)
        measure.save(result, options.json)
    print("\n" + measure.table([finding.row() for finding in findings], HEADER))
    wrong = [finding for finding in findings if finding.holds is False]
    took = time.monotonic() - began
    print(f"\n{len(findings)} findings in {took:.0f} s, {len(wrong)} not as expected", flush=True)
    return result


def workers_of(options: argparse.Namespace, folder: Path) -> Iterator[Worker]:
    """The sections' processes; the next one's imports, as long as some sections, go on beside each."""
    chosen = [section for section in SECTIONS if section.name in options.sections]
    workers = [start(chosen[0], options, folder)]
    try:
        for section in chosen[1:]:
            workers.append(start(section, options, folder))
            yield workers[-2]
        yield workers[-1]
    finally:
        for worker in workers[-2:]:
            worker.end()


def start(section: Section, options: argparse.Namespace, folder: Path) -> Worker:
    """The process of a section."""
    command = [sys.executable, __file__, "--run", section.name, "--folder", str(folder)]
    command += ["--device", str(options.device), *(["--tiny"] if options.tiny else [])]
    command += ["--images", str(options.images)] if options.images else []
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
    if options.device.type == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return Worker(section.name, section.seconds * (TINY_PATIENCE if options.tiny else 1), command, environment)


def _verdict(status: str) -> bool | None:
    """A section that had no time is not wrong."""
    return None if status in (SKIPPED, OUT_OF_TIME) else False


class Worker:
    """The process of a section, which imports what it needs and then waits for its turn: a line on its input."""

    def __init__(self, name: str, seconds: float, command: list[str], environment: dict[str, str]) -> None:
        self.name, self.share, self.ended = name, seconds, False
        # A session of its own, so that what it starts can be ended with it.
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, left: float) -> dict[str, Any]:
        """Give it the turn and, of the ``left`` seconds, its share; how it ended."""
        seconds, began = min(self.share, left), time.monotonic()
        try:
            if seconds < LEAST:
                return {"status": SKIPPED, "seconds": 0.0}
            print(f"\n=== {self.name}, at most {seconds:.0f} s", flush=True)
            status = self._wait(seconds)
        finally:
            self.end()
        return {"status": status, "seconds": round(time.monotonic() - began, 1)}

    def _wait(self, seconds: float) -> str:
        assert self.process.stdin is not None
        try:
            print(seconds - GRACE, file=self.process.stdin, flush=True)
            code = self.process.wait(seconds)
        except BrokenPipeError:  # it did not get as far as its turn
            code = self.process.wait()
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        return DONE if code == 0 else f"ended with {code}"

    def end(self) -> None:
        """The process and all that it has started."""
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_section(options: argparse.Namespace) -> None:
    """What the process of a section does: import, wait for its turn and the seconds of its share, measure."""
    section = next(section for section in SECTIONS if section.name == options.run)
    function = getattr(importlib.import_module(section.module), section.function)
    if not (turn := sys.stdin.readline()):
        return
    context = Context(section.name, options.device, options.folder, float(turn), options.tiny, options.images)
    arguments = [section.argument] if section.argument else []
    context.attempt("the section", lambda: function(context, *arguments))


if __name__ == "__main__":
    main()
