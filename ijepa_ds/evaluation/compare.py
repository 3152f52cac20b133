"""Evaluations side by side: what each run reached, its baselines, the differences, and the paper's numbers."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ijepa_ds.errors import UserError

SCHEMA = 1
# I-JEPA (arXiv 2301.08243), tables 1 to 4 and appendix: (task, data) -> model -> percent. Linear and low-shot are
# ImageNet-1k, low-shot with 1 % of its labels.
PAPER = {
    ("linear", None): {"B/16": 72.9, "L/16": 77.5, "H/14": 79.3, "H/16 448": 81.1},
    ("lowshot", None): {"L/16": 69.4, "H/14": 73.3, "H/16 448": 77.3},
    ("count", None): {"H/14": 86.7},
    ("depth", None): {"H/14": 72.4},
    ("transfer", "cifar100"): {"H/14": 87.5},
    ("transfer", "places205"): {"H/14": 58.4},
    ("transfer", "inat18"): {"H/14": 47.6},
}
PAPER_MODELS = ("B/16", "L/16", "H/14", "H/16 448")
PAPER_NOTE = (
    "paper: I-JEPA ViT on ImageNet-1k (linear; lowshot: 1 % of the labels), CLEVR (count, depth) or the data named"
)


@dataclass(frozen=True)
class Cell:
    """What one run reached on one row; means and deviations over the baselines' seeds."""

    value: float
    random: float
    random_deviation: float | None  # of a single random encoder: None
    pixels: float | None
    train_images: int | None
    validation_images: int | None


@dataclass(frozen=True)
class Row:
    """One task and label; a run that lacks it has None."""

    task: str
    label: str
    metric: str
    unit: str
    cells: list[Cell | None]
    paper: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """All of it. ``names`` of the runs, in the order of every row's cells."""

    names: list[str]
    rows: list[Row]
    warnings: list[str]


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds compare``."""
    parser = argparse.ArgumentParser(prog="python -m ijepa_ds compare", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json|RUN", help="from evaluate: a file, or a run folder")
    parser.add_argument("--paper", action="store_true", help="with the paper's numbers in further columns")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the runs' bars, too")
    options = parser.parse_args(arguments)
    if options.plot and not options.plot.endswith(".png"):
        raise UserError(f"--plot {options.plot} is no PNG: give a name that ends in .png")
    files = [find_results(path) for path in options.results]
    comparison = compare([load_results(file) for file in files], names=options.results)
    if options.json:
        print(json.dumps(_finite(asdict(comparison)), indent=2))
    else:
        print(format_table(comparison, paper=options.paper))
    if options.plot:
        from ijepa_ds.evaluation.plots import save  # matplotlib takes a second, which only a picture needs

        path = save(comparison_figure(comparison, paper=options.paper), Path(options.plot))
        if not options.json:
            print(f"written: {path}")
    return 0


def find_results(path: str | Path) -> Path:
    """The results.json that ``path`` is or holds.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    places = [path / "evaluation" / "results.json", path / "results.json"] if path.is_dir() else [path]
    for place in places:
        if place.is_file():
            return place
    if path.is_dir():
        raise UserError(f"{path} holds no results.json; make one: python -m ijepa_ds evaluate --checkpoint {path}")
    raise UserError(f"{path} does not exist; give a results.json of python -m ijepa_ds evaluate, or its run folder")


def load_results(file: Path) -> dict[str, Any]:
    """Read and check a results.json.

    Raises:
        UserError: it is something else, or of another schema.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); give a results.json of evaluate") from error
    if not isinstance(results, dict) or not isinstance(results.get("tasks"), list):
        raise UserError(f"{file} holds no results: it has no list of tasks; give a results.json of evaluate")
    if results.get("schema") != SCHEMA:
        raise UserError(f"{file} has schema {results.get('schema')}, not {SCHEMA}; evaluate the checkpoint again")
    for key in ("options", "config"):
        if not isinstance(results.get(key) or {}, dict):
            raise UserError(f"{file}: '{key}' is no object; evaluate the checkpoint again")
    if not results["tasks"]:
        raise UserError(f"{file} holds no tasks; evaluate the checkpoint again")
    for number, task in enumerate(results["tasks"]):
        if not isinstance(task, dict):
            raise UserError(f"{file}: task {number} is no object; evaluate the checkpoint again")
        if not isinstance(task.get("baselines") or {}, dict):
            raise UserError(f"{file}: task {number} has no usable 'baselines'; evaluate the checkpoint again")
        for key, kind in (("task", str), ("label", str), ("metric", str), ("unit", str), ("value", int | float)):
            if not isinstance(task.get(key), kind) or isinstance(task.get(key), bool):
                raise UserError(f"{file}: task {number} has no usable '{key}'; evaluate the checkpoint again")
    return results


def compare(runs: Sequence[dict[str, Any]], *, names: Sequence[str]) -> Comparison:
    """Rows over all tasks of ``runs`` (results of schema 1), in the order in which they first appear."""
    warnings = _differences(runs, names)
    found: dict[tuple, dict[int, Cell]] = {}
    data: dict[tuple, str | None] = {}
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        seen: dict[tuple, int] = {}
        for task in run["tasks"]:
            identity = (task["task"], task["label"], task["metric"], task["unit"])
            seen[identity] = seen.get(identity, 0) + 1
            cell = _cell(task)
            if cell is None:  # a result means nothing without its baselines
                warnings.append(f"{name} has no random encoders beside {task['task']} {task['label']}: left out")
                continue
            key = (*identity, seen[identity])
            found.setdefault(key, {})[index] = cell
            data.setdefault(key, _data_set(run, task))
    rows = []
    for key, cells in found.items():
        task, label, metric, unit, number = key
        for count in ("train_images", "validation_images"):
            counts = {getattr(cell, count) for cell in cells.values()}
            if len(counts) > 1:
                shown = ", ".join("unknown" if n is None else f"{n:,}" for n in sorted(counts, key=lambda n: n or 0))
                warnings.append(f"{task} {label}: {count.replace('_', ' ')} differ ({shown})")
        paper = PAPER.get((task, data[key]), PAPER.get((task, None), {})) if metric == "accuracy" else {}
        name = label + (f" ({data[key]})" if data[key] else "") + (f" #{number}" if number > 1 else "")
        rows.append(Row(task, name, metric, unit, [cells.get(index) for index in range(len(runs))], paper))
    return Comparison(list(names), rows, warnings)


def format_table(comparison: Comparison, *, paper: bool) -> str:
    """One line a row; of each run its value, random encoders (mean ± deviation), raw pixels and what it gained."""
    several = len(comparison.names) > 1
    letters = [_letter(index) for index in range(len(comparison.names))]
    header = ["task", "label", "metric"]
    for letter in letters:
        header += [letter, f"{letter} random", f"{letter} pixels", f"{letter} - random"]
    header += [f"{letter} - A" for letter in letters[1:]]
    models = [m for m in PAPER_MODELS if any(m in row.paper for row in comparison.rows)] if paper else []
    header += [f"paper {model}" for model in models]
    lines = [header]
    for row in comparison.rows:
        line = [row.task, row.label, f"{row.metric} {row.unit}".strip()]
        for cell in row.cells:
            line += _cell_text(cell)
        first = row.cells[0]
        line += ["-" if not (first and cell) else f"{cell.value - first.value:+.2f}" for cell in row.cells[1:]]
        line += [f"{row.paper[model]:.1f}" if model in row.paper else "-" for model in models]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(_pad(cell, width, column) for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    legend = [f"{letter}: {name}" for letter, name in zip(letters, comparison.names, strict=True)] if several else []
    notes = [PAPER_NOTE] if models else []
    notes += [f"warning: {warning}" for warning in comparison.warnings]
    return "\n".join([*legend, *(line.rstrip() for line in text), *notes])


def comparison_figure(comparison: Comparison, *, paper: bool) -> Any:
    """Bars of every run, the random encoder of the first one, and the paper's best where asked for."""
    from ijepa_ds.evaluation.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, bar_figure

    palette = (BLUE, ORANGE, GREEN, PURPLE, SKY)
    bars: dict[str, tuple[list[float | None], str]] = {}
    for index, name in enumerate(comparison.names):
        values = [cell.value if (cell := row.cells[index]) else None for row in comparison.rows]
        bars[f"{_letter(index)}: {name}"] = values, palette[index % len(palette)]
    cells = [next(cell for cell in row.cells if cell) for row in comparison.rows]
    bars["random encoder"] = [cell.random for cell in cells], GREY
    if paper and any(row.paper for row in comparison.rows):
        bars["paper, ViT-H/14"] = [row.paper.get("H/14") for row in comparison.rows], RED
    names = [row.task if row.label in ("label", row.task) else f"{row.task}, {row.label}" for row in comparison.rows]
    unit = ", ".join(sorted({row.unit for row in comparison.rows}))
    deviations = {"random encoder": [cell.random_deviation or 0.0 for cell in cells]}
    return bar_figure(names, bars, deviations, unit=unit, title="Evaluations side by side")


def _cell(task: dict[str, Any]) -> Cell | None:
    random, pixels = (_baseline(task, name) for name in ("random", "pixels"))
    if not random:
        return None
    return Cell(
        float(task["value"]),
        statistics.mean(random),
        statistics.stdev(random) if len(random) > 1 else None,
        statistics.mean(pixels) if pixels else None,
        *(task[key] if isinstance(task.get(key), int) else None for key in ("train_images", "validation_images")),
    )


def _baseline(task: dict[str, Any], name: str) -> list[float]:
    found = (task.get("baselines") or {}).get(name)
    values = found.get("values") if isinstance(found, dict) else None
    return [float(value) for value in values or [] if isinstance(value, int | float) and math.isfinite(value)]


def _differences(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Where the runs were not measured alike, against the first of them."""
    warnings = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        for what, of in (("encoder", lambda r: r.get("encoder")), ("data", _data)):
            if of(run) != of(runs[0]):
                warnings.append(f"{name} and {names[0]} differ in the {what} measured: {of(run)} and {of(runs[0])}")
    return warnings


def _data(run: dict[str, Any]) -> str:
    """The files that a run was measured on: what was asked for, or else the configuration's."""
    options, config = run.get("options") or {}, run.get("config") or {}
    ours = config.get("ijepa") if isinstance(config.get("ijepa"), dict) else {}
    data = ours.get("data") if isinstance(ours.get("data"), dict) else {}
    return " + ".join(str(options.get(key) or data.get(key)) for key in ("train", "validation"))


def _data_set(run: dict[str, Any], task: dict[str, Any]) -> str | None:
    """Which of the paper's transfer sets this is, by the preset or a file's name."""
    named = f"{(run.get('options') or {}).get('preset', '')} {_data(run)}"
    plain = named.lower().replace("-", "").replace("_", "")
    return next((data for _, data in PAPER if data and data in plain), None) if task["task"] == "transfer" else None


def _cell_text(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["-"] * 4
    deviation = "" if cell.random_deviation is None else f" ± {cell.random_deviation:.2f}"
    pixels = "-" if cell.pixels is None else f"{cell.pixels:.2f}"
    return [f"{cell.value:.2f}", f"{cell.random:.2f}{deviation}", pixels, f"{cell.value - cell.random:+.2f}"]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"run{index + 1}"


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < 3 else text.rjust(width)


def _finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
