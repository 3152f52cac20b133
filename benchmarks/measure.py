"""What the benchmarks share: sides timed in turns, what they ran on, and the file that keeps what came of it.

Machines are noisy and their clocks drift: what is compared is timed in turns, A B A B, and a ratio is the median over
the rounds of each round's own ratio. Importing this also lets a script of this folder find the package it lies beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from ijepa_ds.files import replacing  # noqa: E402
from ijepa_ds.hardware import device_name, processor_name  # noqa: E402
from ijepa_ds.run.provenance import git_commit, versions  # noqa: E402

Seconds = dict[str, list[float]]  # side -> of each round


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line with what they all have: ``--device`` and ``--json``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=torch.device, default=torch.device(default))
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    return made


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, *, times: int = 1) -> float:
    """Seconds of one call, the mean of ``times`` in a row."""
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return (time.perf_counter() - began) / times


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    times: int = 1,
) -> Seconds:
    """Seconds of each side's call in each round, after ``warm_up`` rounds that are not kept."""
    seconds: Seconds = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, call in sides.items():
            taken = seconds_of(call, device, times=times)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: Seconds, one: str, other: str) -> float:
    """How many times as long ``one`` takes as ``other``: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def machine(device: torch.device) -> dict[str, Any]:
    """What a result was measured on and with."""
    result: dict[str, Any] = {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }
    if device.type == "cuda":
        result["device_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    return result


def first_paragraph(text: str | None) -> str:
    """Of a benchmark's docstring, on one line: what is compared."""
    return " ".join((text or "").split("\n\n")[0].split())


def record(results: Any, *, compared: str | None, device: torch.device) -> dict[str, Any]:
    """A result as it is kept: what was compared (see :func:`first_paragraph`), by which command, on what."""
    command = ["python", str(Path(sys.argv[0]).name), *sys.argv[1:]]
    return {
        "compared": first_paragraph(compared),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(command),
        "commit": git_commit(),
        "machine": machine(device),
        "results": results,
    }


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write a :func:`record` to ``path``, if one is given; a reader never sees half a file."""
    if path is not None:
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(result, indent=1, default=str) + "\n")


def table(rows: list[list[Any]], header: list[str]) -> str:
    """A Markdown table, its columns lined up; numbers to three digits."""
    cells = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
