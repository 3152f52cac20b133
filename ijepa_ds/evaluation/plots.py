"""Pictures of an evaluation (PNG): grid of heads, confusion, predicted against true, neighbours, baselines.

Shapes: C classes, n images, Q queries, K neighbours of each.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ijepa_ds.errors import UserError

# Okabe and Ito's colours, distinct for colour-blind readers too; cividis is even for them as well.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#8C8C8C"
COLOUR_MAP = "cividis"
DPI = 150
MAX_ANNOTATED = 20  # classes of a confusion matrix whose cells are written out
MAX_POINTS = 2000  # above this points hide each other, and hexagons are counted instead
SHOWN_NEIGHBOURS = 5
MAX_INCHES = 40.0  # of any side


@dataclass(frozen=True)
class Regression:
    """Predicted and true values [n] of one continuous label."""

    label: str
    true: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Neighbours:
    """A few queries and their nearest training images, nearest first; labels as they should be written."""

    queries: np.ndarray  # uint8 [Q, H, W, 3]
    query_labels: Sequence[object]  # [Q]
    images: np.ndarray  # uint8 [Q, K, H, W, 3]
    labels: Sequence[Sequence[object]]  # [Q][K]


def draw_results(
    results: dict[str, Any],
    folder: Path,
    *,
    neighbours: Neighbours | None = None,
    regression: Regression | Sequence[Regression] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Path]:
    """All pictures of one results.json (schema 1) into ``folder``; returns their paths.

    Heat maps are drawn of grids over learning rates and weight decays, of which other tasks have none.

    Args:
        results: read as JSON.
        folder: is made.
        neighbours: to show.
        regression: one or several, to show.
        warn: takes a line for a picture that cannot be drawn or written; without it the first one raises.

    Raises:
        UserError: the folder cannot be written.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    for task in results["tasks"]:
        name = f"{task['task']}_{task['label']}"
        points = [point for point in task.get("grid") or [] if "lr" in point]
        if len(points) > 1:
            figures[_unused(f"grid_{name}", figures)] = partial(grid_figure, {**task, "grid": points})
        if task.get("confusion"):
            figures[_unused(f"confusion_{name}", figures)] = partial(confusion_figure, task)
    if results["tasks"]:
        figures["baselines"] = partial(baseline_figure, results["tasks"], source=results.get("source", ""))
    for one in [regression] if isinstance(regression, Regression) else regression or []:
        figures[_unused(f"regression_{one.label}", figures)] = partial(regression_figure, one)
    if neighbours is not None:
        figures["neighbours"] = partial(neighbours_figure, neighbours)
    paths = []
    for name, draw in figures.items():
        try:
            paths.append(save(draw(), Path(folder) / f"{name}.png"))
        except Exception as error:
            if warn is None:
                raise
            warn(f"the picture {name}.png is missing: {error}")
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; the folder is made.

    Raises:
        UserError: it cannot be written.
    """
    FigureCanvasAgg(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
    return path


def grid_figure(task: dict[str, Any]) -> Figure:
    """Accuracy over the grid: a panel for each kind of features and norm, learning rate down, weight decay across."""
    points = task["grid"]
    panels = sorted({_panel(point) for point in points})
    values = [value for point in points if (value := _number(point.get("value"))) is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    rows, columns = (sorted({_number(point.get(key)) or 0.0 for point in points}) for key in ("lr", "weight_decay"))
    decimals = 1 if high - low >= 1 else 2  # so that heads which are close can be told apart
    size = (max(5.0, len(panels) * (1.2 + 0.8 * len(columns)) + 1.5), 2.2 + 0.45 * len(rows))
    figure = _figure(*size)
    figure.suptitle(f"{_title(task)}: {task['metric']} ({task['unit']}) of every head", fontsize=12)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        cells = np.full((len(rows), len(columns)), np.nan)
        for point in points:
            value = _number(point.get("value"))
            if _panel(point) == panel and value is not None:
                place = (
                    rows.index(_number(point.get("lr")) or 0.0),
                    columns.index(_number(point.get("weight_decay")) or 0.0),
                )
                cells[place] = np.fmax(cells[place], value)
        image = axis.imshow(cells, cmap=COLOUR_MAP, vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
        axis.set_facecolor("#DDDDDD")
        for (row, column), value in np.ndenumerate(cells):
            _write_cell(axis, row, column, f"{value:.{decimals}f}" if np.isfinite(value) else "-", value, low, high)
            if np.isfinite(value) and value == high:
                axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2.5))
        axis.set_title(panel, fontsize=10)
        axis.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axis.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axis.set_xlabel("weight decay")
    axes[0].set_ylabel("learning rate")
    figure.colorbar(image, ax=list(axes), label=f"{task['metric']} ({task['unit']}); best outlined")
    return figure


def confusion_figure(task: dict[str, Any]) -> Figure:
    """Rows are true classes, in percent of the class; a class without images is grey."""
    counts = np.asarray(task["confusion"], float)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    num_classes = len(counts)
    side = min(9.0, max(4.5, 2.0 + 0.55 * num_classes))
    figure = _figure(side + 1, side)
    axis = figure.subplots()
    image = axis.imshow(share, cmap=COLOUR_MAP, vmin=0, vmax=100)
    axis.set_facecolor("#DDDDDD")
    if num_classes <= MAX_ANNOTATED:
        names = (task.get("extra") or {}).get("class_names") or range(num_classes)
        names = list(names) if len(names) == num_classes else range(num_classes)
        axis.set_xticks(range(num_classes), names, rotation=45 if max(len(str(n)) for n in names) > 3 else 0)
        axis.set_yticks(range(num_classes), names)
        for (row, column), value in np.ndenumerate(share):
            _write_cell(axis, row, column, f"{value:.0f}" if np.isfinite(value) else "", value, 0, 100)
    correct = 100 * np.trace(counts) / max(counts.sum(), 1)
    axis.set_title(f"{_title(task)}: confusion of {int(counts.sum()):,} images, {correct:.1f} % correct", fontsize=11)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    figure.colorbar(image, label="% of the true class", shrink=0.85)
    return figure


def regression_figure(regression: Regression) -> Figure:
    """Predicted against true values, with the diagonal of a perfect prediction; what is no number is left out."""
    true, predicted = (np.asarray(values, float).ravel() for values in (regression.true, regression.predicted))
    usable = np.isfinite(true) & np.isfinite(predicted)
    true, predicted = true[usable], predicted[usable]
    figure = _figure(5.6, 5.2)
    axis = figure.subplots()
    if len(true) == 0:
        axis.set_title(f"{regression.label}: nothing that is a number was predicted", fontsize=11)
        return figure
    ends = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    margin = 0.03 * (ends[1] - ends[0]) or 0.5
    limits = ends[0] - margin, ends[1] + margin
    if len(true) > MAX_POINTS:
        bins = axis.hexbin(
            true, predicted, gridsize=50, extent=(*limits, *limits), cmap=COLOUR_MAP, mincnt=1, bins="log"
        )
        figure.colorbar(bins, label="images in a hexagon", shrink=0.85)
    else:
        axis.scatter(true, predicted, s=10, color=BLUE, alpha=0.5, linewidths=0)
    axis.plot(limits, limits, color=RED, linestyle="--", linewidth=1.5, label="perfect")
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.legend(loc="upper left", frameon=False)
    error = np.abs(predicted - true).mean()
    axis.set_title(f"{regression.label}: mean absolute error {error:.3g}, {len(true):,} images", fontsize=11)
    axis.set_xlabel(f"true {regression.label}")
    axis.set_ylabel(f"predicted {regression.label}")
    return figure


def neighbours_figure(neighbours: Neighbours) -> Figure:
    """Each row a query and its nearest training images, the label under each, green where it is the query's."""
    queries, images = np.asarray(neighbours.queries), np.asarray(neighbours.images)
    shown = min(SHOWN_NEIGHBOURS, images.shape[1])
    figure = _figure(1.35 * (shown + 1) + 0.3, 1.6 * len(queries) + 0.6)
    figure.suptitle("Nearest training images of a few validation images", fontsize=12)
    cells = figure.subplots(len(queries), shown + 1, squeeze=False)
    for row, query, label, near, near_labels in zip(
        cells, queries, neighbours.query_labels, images, neighbours.labels, strict=True
    ):
        _show(row[0], query, str(label), "black")
        for axis, image, other in zip(row[1:], near, near_labels, strict=False):
            same = str(other) == str(label)
            _show(axis, image, f"{other}" if same else f"{other} ✗", "#00684D" if same else "#A34700")
    for axis, name in zip(cells[0], ["query", *(f"nearest {k + 1}" for k in range(shown))], strict=True):
        axis.set_title(name, fontsize=9)
    return figure


def baseline_figure(tasks: Sequence[dict[str, Any]], *, source: str) -> Figure:
    """Trained, random and raw pixels side by side for every task; the bar of random encoders shows their deviation."""
    names = [_title(task) for task in tasks]
    bars = {
        "this encoder": ([_number(task["value"]) for task in tasks], BLUE),
        "random encoder": ([_mean(baseline(task, "random")) for task in tasks], ORANGE),
        "raw pixels": ([_mean(baseline(task, "pixels")) for task in tasks], GREY),
    }
    deviations = {"random encoder": [_deviation(baseline(task, "random")) for task in tasks]}
    units = sorted({task["unit"] for task in tasks})
    return bar_figure(names, bars, deviations, unit=", ".join(units), title=f"Beside its baselines: {source}")


def bar_figure(
    names: Sequence[str],
    bars: dict[str, tuple[Sequence[float | None], str]],
    deviations: dict[str, Sequence[float]],
    *,
    unit: str,
    title: str,
) -> Figure:
    """Groups of bars with their values written out; ``bars`` is legend -> (a value or None each group, colour)."""
    figure = _figure(max(5.5, 1.5 + len(names) * (0.5 + 0.55 * len(bars))), 4.4)
    axis = figure.subplots()
    width = 0.8 / len(bars)
    for k, (legend, (values, colour)) in enumerate(bars.items()):
        heights = np.array([math.nan if value is None else value for value in values], float)
        places = np.arange(len(names)) + (k - (len(bars) - 1) / 2) * width
        spread = deviations.get(legend)
        axis.bar(places, heights, width * 0.92, color=colour, label=legend, yerr=spread, capsize=3, ecolor="#333333")
        for index, (place, height) in enumerate(zip(places, heights, strict=True)):
            if np.isfinite(height):
                top = max(height, 0) + (spread[index] if spread else 0)
                axis.annotate(
                    f"{height:.1f}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=8
                )
    axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=9)
    axis.set_ylabel(unit)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title if len(title) < 90 else "…" + title[-88:], fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(4, len(bars)), frameon=False)
    return figure


def baseline(task: dict[str, Any], name: str) -> list[float]:
    """The finite values of a baseline of a task; empty where it has none."""
    values = ((task.get("baselines") or {}).get(name) or {}).get("values") or []
    return [number for value in values if (number := _number(value)) is not None]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(min(width, MAX_INCHES), min(height, MAX_INCHES)), layout="constrained")


def _title(task: dict[str, Any]) -> str:
    return task["task"] if task["label"] in ("label", task["task"]) else f"{task['task']}, {task['label']}"


def _panel(point: dict[str, Any]) -> str:
    return " + ".join(str(point[key]) for key in ("features", "norm") if point.get(key)) or "all heads"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _unused(name: str, taken: dict[str, Any]) -> str:
    """``name`` as a file's, with a number where it is taken."""
    name = re.sub(r"[^\w.-]+", "_", name)
    number = next(k for k in range(1, len(taken) + 2) if (name if k == 1 else f"{name}_{k}") not in taken)
    return name if number == 1 else f"{name}_{number}"


def _write_cell(axis: Axes, row: int, column: int, text: str, value: float, low: float, high: float) -> None:
    dark = np.isfinite(value) and (value - low) < 0.5 * (high - low)
    axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _show(axis: Axes, image: np.ndarray, text: str, colour: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(text, fontsize=9, color=colour)
