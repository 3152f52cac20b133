"""``python -m ijepa_ds checkpoints``: what a run has saved, and whether it is whole."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from ijepa_ds.engine.checkpoint_files import SET_ASIDE, UNFINISHED, open_checkpoint, problem_of
from ijepa_ds.engine.rank_files import Damaged
from ijepa_ds.errors import UserError

_COLUMNS = "{:<24}  {:>10}  {:>10}  {:<16}  {:>9}  {:<6}  {}"


@dataclass(frozen=True)
class Row:
    """A checkpoint; ``problem``: what is wrong with it, if anything was found."""

    name: str
    step: str
    size: int  # bytes
    written: float  # unix seconds
    processes: str
    layout: str
    problem: str | None


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 where one is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds checkpoints", description="List a run's checkpoints: step, size, whole or why not."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/vith14")
    parser.add_argument("--verify", action="store_true", help="read them whole and compare every checksum")
    options = parser.parse_args(arguments)
    rows, others = look(options.run, verify=options.verify)
    print(_COLUMNS.format("folder", "step", "MB", "written", "processes", "layout", "state"))
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.written))
        state = row.problem or ("whole" if options.verify else "complete; --verify reads what is in it")
        print(_COLUMNS.format(row.name, row.step, f"{row.size / 1e6:,.1f}", when, row.processes, row.layout, state))
    for name, what in others:
        print(f"{name:<24}  {what}")
    return 1 if any(row.problem for row in rows) else 0


def look(run: Path, *, verify: bool) -> tuple[list[Row], list[tuple[str, str]]]:
    """A run's checkpoints, oldest first, and what else lies beside them: name and what it is.

    Without ``verify`` only the heads of the files are read.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is no run folder with checkpoints; give one, such as runs/vith14")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    rows = [_row(path, verify=verify) for path in found if path.name.startswith("step_")]
    others = [(path.name, "found damaged and set aside") for path in found if path.name.startswith(SET_ASIDE)]
    others += [(path.name, "unfinished") for path in found if path.name.startswith(UNFINISHED)]
    if not rows and not others:
        raise UserError(f"{run} has no checkpoint yet; train first: deepspeed run.py --config FILE.json")
    return rows, others


def _row(path: Path, *, verify: bool) -> Row:
    step = processes = layout = "?"
    problem = problem_of(path) if verify else None
    try:
        state = open_checkpoint(path).state
        step, processes, layout = str(state.step), str(state.processes), state.layout
    except Damaged as error:
        problem = problem or error.what
    except UserError as error:  # of a later version
        problem = problem or str(error)
    files = [file.stat() for file in path.iterdir() if file.is_file()]
    written = max((file.st_mtime for file in files), default=path.stat().st_mtime)
    return Row(path.name, step, sum(file.st_size for file in files), written, processes, layout, problem)
