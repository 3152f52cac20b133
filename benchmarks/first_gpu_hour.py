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
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
from gpu_findings import HEADER, Context, Finding, load_findings

START = 15.0  # seconds that the imports of a section may take beside its share
LEAST = 20.0  # a section with less is not begun


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
    Section("device", "gpu_speed", "device", 25),
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
    parser.add_argument("--minutes", type=float, default=9.3, help="of the whole (default: 9.3)")
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--images", type=Path, help="a .beton file (default: scenes rendered for the occasion)")
    parser.add_argument("--run", choices=names, help=argparse.SUPPRESS)  # a section, in the process that is its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each section in turn while there is time; the record, written after each."""
    began, findings = time.monotonic(), []
    sections: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    for section in [section for section in SECTIONS if section.name in options.sections]:
        left = 60 * options.minutes - (time.monotonic() - began)
        seconds = min(section.seconds, left - START)
        if seconds < LEAST:
            status = f"skipped: {max(0.0, left):.0f} s are left of {options.minutes:g} minutes"
            sections[section.name] = {"status": status, "seconds": 0.0}
        else:
            print(f"\n=== {section.name}, at most {seconds:.0f} s", flush=True)
            sections[section.name] = run_process(section, options, folder, seconds)
            findings += load_findings(folder / f"{section.name}.json")
        if (status := sections[section.name]["status"]) != "done":
            findings.append(Finding(section.name, "the section", status, "done", _verdict(status)))
        found = {"sections": sections, "findings": [asdict(finding) for finding in findings]}
        result = measure.record(found, compared=__doc__, device=options.device)
        measure.save(result, options.json)
    print("\n" + measure.table([finding.row() for finding in findings], HEADER))
    wrong = [finding for finding in findings if finding.holds is False]
    took = time.monotonic() - began
    print(f"\n{len(findings)} findings in {took:.0f} s, {len(wrong)} not as expected", flush=True)
    return result


def _verdict(status: str) -> bool | None:
    """A section that had no time is not wrong."""
    return None if status.startswith(("skipped", "out of time")) else False


def run_process(section: Section, options: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """A section in a process of its own, which is ended at the end of its share; how it ended."""
    command = [sys.executable, __file__, "--run", section.name, "--folder", str(folder), "--seconds", str(seconds)]
    command += ["--device", str(options.device), *(["--tiny"] if options.tiny else [])]
    command += ["--images", str(options.images)] if options.images else []
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
    if options.device.type == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = {0: "done"}.get(code := process.wait(seconds + START), f"ended with {code}")
    except subprocess.TimeoutExpired:
        status = "out of time: what it had found by then is kept"
    finally:
        _end(process)
    return {"status": status, "seconds": round(time.monotonic() - began, 1)}


def _end(process: subprocess.Popen) -> None:
    """The section and what it has started: a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_section(options: argparse.Namespace) -> None:
    """What the process of a section does."""
    section = next(section for section in SECTIONS if section.name == options.run)
    context = Context(section.name, options.device, options.folder, options.seconds, options.tiny, options.images)
    with context.attempt("the section"):
        function = getattr(importlib.import_module(section.module), section.function)
        function(context, *([section.argument] if section.argument else []))


if __name__ == "__main__":
    main()
