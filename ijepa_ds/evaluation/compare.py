"""Evaluations side by side: what each run reached, its baselines, the differences, and the paper's numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.results import RMSE, Heading, Results, aligned, format_value, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
DENSE = "dense_data"  # the option
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
    train_images: int
    validation_images: int


@dataclass(frozen=True, kw_only=True)
class Row(Heading):
    """One task and label; a run that lacks it has None."""

    cells: list[Cell | None]
    paper: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """All rows; the cells of each are in the order of the runs' ``names``."""

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
    comparison = compare([read_results(find_results(path)) for path in options.results], names=options.results)
    if options.json:
        print(TypeAdapter(Comparison).dump_json(comparison, indent=2).decode())  # null for what is no number
    else:
        print(format_comparison(comparison, paper=options.paper))
    if options.plot:
        from ijepa_ds.evaluation.plots import save  # matplotlib takes a second, which only a picture needs

        path = save(comparison_figure(comparison, paper=options.paper), Path(options.plot))
        if not options.json:
            print(f"written: {path}")
    return 0


def find_results(path: str) -> Path:
    """The results.json that ``path`` is or holds, in ``evaluation/`` of a run."""
    if not Path(path).is_dir():
        return Path(path)
    for place in (Path(path, "evaluation", "results.json"), Path(path, "results.json")):
        if place.is_file():
            return place
    raise UserError(f"{path} holds no results.json; make one: python -m ijepa_ds evaluate --checkpoint {path}")


def compare(runs: Sequence[Results], *, names: Sequence[str]) -> Comparison:
    """Rows over all tasks of ``runs``, in the order in which they first appear, and where runs are not alike."""
    warnings: list[str] = []
    rows: dict[tuple[str, ...], Row] = {}
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        for what, of in (("encoder", lambda run: run.encoder), ("data", _data)):
            if of(run) != of(runs[0]):
                warnings.append(f"{name} and {names[0]} differ in the {what} measured: {of(run)} and {of(runs[0])}")
        for task in run.tasks:
            random, deviation = task.baseline("random")
            if random is None:  # a result means nothing without its baselines
                warnings.append(f"{name} has no random encoders beside {task.task} {task.label}: left out")
                continue
            plain = f"{run.options.get('preset')} {_data(run)}".lower().replace("-", "").replace("_", "")
            data = next((data for of, data in PAPER if of == task.task and data and data in plain), None)
            label = f"{task.label} ({data})" if data else task.label
            paper = PAPER.get((task.task, data), {}) if task.metric == "accuracy" else {}
            heading = {"task": task.task, "label": label, "metric": task.metric, "unit": task.unit}
            row = Row(**heading, cells=[None] * len(runs), paper=paper)
            sizes = task.train_images, task.validation_images
            cell = Cell(task.value, random, deviation, task.baseline("pixels")[0], *sizes)
            rows.setdefault((task.task, task.label, task.metric, task.unit), row).cells[index] = cell
    # Of --task dense; a run without it has no such row.
    folders = {str(folder): name for run, name in zip(runs, names, strict=True) if (folder := run.options.get(DENSE))}
    if len(folders) > 1:
        texts = ", ".join(f"{name} {folder}" for folder, name in folders.items())
        warnings.append(f"the folders of dense data differ: {texts}")
    for row in rows.values():
        for what in ("train_images", "validation_images"):
            numbers = sorted({getattr(cell, what) for cell in row.cells if cell})
            if len(numbers) > 1:
                texts = ", ".join(f"{number:,}" for number in numbers)
                warnings.append(f"{row.task} {row.label}: {what.replace('_', ' ')} differ ({texts})")
    return Comparison(list(names), list(rows.values()), warnings)


def _data(run: Results) -> str:
    """The files that a run was measured on: what was asked for, or else the configuration's."""
    data: Any = run.config
    for key in ("ijepa", "data"):  # a file that somebody has edited may hold anything there
        data = data.get(key) if isinstance(data, dict) else None
    data = data if isinstance(data, dict) else {}
    return " + ".join(str(run.options.get(key) or data.get(key)) for key in ("train", "validation"))


def format_comparison(comparison: Comparison, *, paper: bool) -> str:
    """One line a row; of each run its value, random encoders (mean ± deviation), raw pixels and what it gained."""
    letters = [letter(index) for index in range(len(comparison.names))]
    models = [model for model in PAPER["linear", None] if paper and any(model in row.paper for row in comparison.rows)]
    columns = (column for run in letters for column in (run, f"{run} random", f"{run} pixels", f"{run} - random"))
    differences = (f"{run} - A" for run in letters[1:])
    lines = [["task", "label", "metric", *columns, *differences, *(f"paper {model}" for model in models)]]
    for row in comparison.rows:
        line, first = [row.task, row.label, f"{row.metric} {row.unit}".strip()], row.cells[0]
        digits = row.digits
        for cell in row.cells:
            if cell is None:
                line += ["-"] * 4
            else:
                line += [format_value(cell.value, digits=digits)]
                line += [format_value(cell.random, cell.random_deviation, digits=digits)]
                line += [format_value(cell.pixels, digits=digits), f"{cell.value - cell.random:+.{digits}f}"]
        line += [f"{cell.value - first.value:+.{digits}f}" if first and cell else "-" for cell in row.cells[1:]]
        lines.append(line + [f"{row.paper[model]:.1f}" if model in row.paper else "-" for model in models])
    names = [f"{run}: {name}" for run, name in zip(letters, comparison.names, strict=True)]
    errors = [f"{RMSE}: an error, so less is better"] * any(row.lower_is_better for row in comparison.rows)
    notes = [PAPER_NOTE] * bool(models) + errors + [f"warning: {warning}" for warning in comparison.warnings]
    return "\n".join([*(names if len(names) > 1 else []), *aligned(lines, numbers=range(3, len(lines[0]))), *notes])


def letter(index: int) -> str:
    """How the run at ``index`` is called in the table: ``A``, ``B``, and from the 27th on ``run27``."""
    return chr(ord("A") + index) if index < 26 else f"run{index + 1}"


def comparison_figure(comparison: Comparison, *, paper: bool) -> Figure:
    """Bars of every run, the random encoders of the first one, and the paper's best where asked for."""
    from ijepa_ds.evaluation.plots import RANDOM, Heights, bar_figure

    rows, bars = comparison.rows, dict[str, Heights]()
    for index, name in enumerate(comparison.names):
        bars[f"{letter(index)}: {name}"] = [cell.value if (cell := row.cells[index]) else None for row in rows]
    first = [next(cell for cell in row.cells if cell) for row in rows]
    bars[RANDOM] = [cell.random for cell in first]
    if paper and any(row.paper for row in rows):
        bars["paper, ViT-H/14"] = [row.paper.get("H/14") for row in rows]
    return bar_figure(rows, bars, [cell.random_deviation for cell in first], title="Evaluations side by side")
