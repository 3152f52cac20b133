"""Pictures of an evaluation (PNG): grid of heads, confusion, predicted against true, neighbours, baselines.

Shapes: H x W pixels, C classes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.dense_data import Example
from ijepa_ds.evaluation.dense_folders import IGNORED
from ijepa_ds.evaluation.results import Heading, Results, TaskResult

# Okabe and Ito's colours, distinct for colour-blind readers too; cividis is even for them as well.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
BLUE, RED = PALETTE[0], PALETTE[-1]
GREY, LIGHT_GREY = "#8C8C8C", "#DDDDDD"
RANDOM = "random encoder"  # the bar that has deviations
MAX_ANNOTATED = 20  # classes of a confusion matrix whose cells are written out
SHOWN_NEIGHBOURS = 5
MAX_INCHES = 40.0  # of any side
Heights = Sequence[float | None]  # one in each group of bars, None where there is none
Bars = Mapping[str, Heights]  # by legend
Labelled = tuple[np.ndarray, str]  # an image, uint8 [H, W, 3], and its label as it should be written
Rows = Sequence[Sequence[Labelled]]  # each a query and its nearest training images


def draw_results(
    results: Results,
    folder: Path,
    *,
    neighbours: Callable[[], Rows] | None,
    examples: Mapping[str, Sequence[Example]] | None = None,
) -> list[Path]:
    """Draw all pictures of an evaluation into ``folder``, which is made, and return their paths.

    ``examples`` are images with their truth and predictions, by the name of the picture that shows them.

    Heat maps are drawn of grids over learning rates and weight decays, of which other tasks have none. A picture that
    cannot be drawn or written is said in a line; for ``neighbours`` images are read, so this is done here.
    """
    figures: dict[str, Callable[[], Figure]] = {"baselines": partial(baseline_figure, results)}
    if neighbours is not None:
        figures["neighbours"] = lambda: neighbours_figure(neighbours())
    classes: list[str] = next((task.extra["class_names"] for task in results.tasks if "iou" in task.extra), [])
    for name, shown in (examples or {}).items():
        figures[name] = partial(examples_figure, shown, classes)
    for task in results.tasks:
        name = f"{task.task}_{task.label}"
        if sum("lr" in head for head in task.grid) > 1:
            figures[_unused(f"grid_{name}", figures)] = partial(grid_figure, task)
        if task.confusion:
            figures[_unused(f"confusion_{name}", figures)] = partial(confusion_figure, task)
        if "true_values" in task.extra:
            names = dict.fromkeys([task.label, task.task])
            figures[_unused("_".join(["regression", *names]), figures)] = partial(regression_figure, task)
    paths = []
    for name, draw in figures.items():
        try:
            paths.append(save(draw(), folder / f"{name}.png"))
        except Exception as error:
            print(f"warning: the picture {name}.png is missing: {error}", flush=True)
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; the folder is made. UserError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
    return path


def grid_figure(task: TaskResult) -> Figure:
    """Accuracy over the grid: a panel for each kind of features and norm, learning rate down, weight decay across."""
    points: dict[tuple[Any, ...], float] = {}  # by panel, learning rate and weight decay
    for head in task.grid:
        if "lr" in head:
            panel = " + ".join(str(head[key]) for key in ("features", "norm") if head.get(key))
            place = panel, head["lr"], head.get("weight_decay", 0.0)
            points[place] = np.fmax(points.get(place, np.nan), head["value"])
    panels = sorted({panel for panel, _, _ in points})
    rates, decays = sorted({rate for _, rate, _ in points}), sorted({decay for _, _, decay in points})
    places = itertools.product(panels, rates, decays)
    cells = np.array([points.get(place, np.nan) for place in places]).reshape(len(panels), len(rates), len(decays))
    low, high = np.nanmin(cells), np.nanmax(cells)
    digits = 1 if high - low >= 1 else 2  # so that heads which are close can be told apart
    figure = _figure(max(5.0, len(panels) * (1.2 + 0.8 * len(decays)) + 1.5), 2.2 + 0.45 * len(rates))
    figure.suptitle(f"{task.title}: {task.metric} ({task.unit}) of every head", fontsize=12)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel, values in zip(axes, panels, cells, strict=True):
        image = _heat_map(axis, values, (low, high), digits, missing="-")
        for row, column in np.argwhere(values == high):
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2.5))
        axis.set_title(panel, fontsize=10)
        axis.set(xlabel="weight decay", aspect="auto")
        axis.set_xticks(range(len(decays)), [f"{value:g}" for value in decays])
        axis.set_yticks(range(len(rates)), [f"{value:g}" for value in rates])
    axes[0].set_ylabel("learning rate")
    figure.colorbar(image, ax=list(axes), label=f"{task.metric} ({task.unit}); best outlined")
    return figure


def confusion_figure(task: TaskResult) -> Figure:
    """Rows are true classes, in percent of the class; a class without images is grey."""
    counts = np.asarray(task.confusion, float)  # [C, C]
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    num_classes, annotated = len(counts), len(counts) <= MAX_ANNOTATED
    side = min(9.0, max(4.5, 2.0 + 0.55 * num_classes))
    figure = _figure(side + 1, side)
    axis = figure.subplots()
    image = _heat_map(axis, share, (0, 100), 0 if annotated else None, missing="")
    if annotated:
        names = [str(name) for name in task.extra.get("class_names") or range(num_classes)]
        axis.set_xticks(range(num_classes), names, rotation=45 if max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(num_classes), names)
    counted = task.extra.get("counted", "images")
    of_images = f"{int(counts.sum()):,} {counted}, {100 * np.trace(counts) / max(counts.sum(), 1):.1f} % correct"
    axis.set_title(f"{task.title}: confusion of {of_images}", fontsize=11)
    axis.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, label="% of the true class", shrink=0.85)
    return figure


def regression_figure(task: TaskResult) -> Figure:
    """Predicted against true values, with the diagonal of a perfect prediction; what is no number is left out."""
    true, predicted = (np.asarray(task.extra[f"{kind}_values"], float) for kind in ("true", "predicted"))
    usable = np.isfinite(true) & np.isfinite(predicted)
    true, predicted = true[usable], predicted[usable]
    figure = _figure(5.6, 5.2)
    axis = figure.subplots()
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    margin = 0.03 * (high - low) or 0.5
    limits = low - margin, high + margin
    axis.scatter(true, predicted, s=10, color=BLUE, alpha=0.5, linewidths=0)
    axis.plot(limits, limits, color=RED, linestyle="--", linewidth=1.5, label="perfect")
    axis.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"true {task.label}", ylabel=f"predicted {task.label}")
    axis.legend(loc="upper left", frameon=False)
    error = f"mean absolute error {np.abs(predicted - true).mean():.3g}"
    axis.set_title(f"{task.title}: {error}, {len(true):,} images", fontsize=11)
    return figure


def neighbours_figure(rows: Rows) -> Figure:
    """Each row a query and its nearest training images, the label under each, green where it is the query's."""
    names = ["query", *(f"nearest {k + 1}" for k in range(SHOWN_NEIGHBOURS))][: len(rows[0])]
    figure = _figure(1.35 * len(names) + 0.3, 1.6 * len(rows) + 0.6)
    figure.suptitle("Nearest training images of a few validation images", fontsize=12)
    cells = figure.subplots(len(rows), len(names), squeeze=False)
    for axes, row in zip(cells, rows, strict=True):
        for axis, (image, label) in zip(axes, row, strict=False):
            same = label == row[0][1]
            axis.imshow(image, interpolation="nearest")
            axis.set_xlabel(label if same else f"{label} ✗", fontsize=9, color="#00684D" if same else "#A34700")
            axis.set(xticks=[], yticks=[])
        axes[0].xaxis.label.set_color("black")
    for axis, name in zip(cells[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    return figure


def examples_figure(examples: Sequence[Example], names: Sequence[str]) -> Figure:
    """Each row an image, its truth and what each probe said: classes in colours with their ``names``, or depths.

    Pixels without a class or depth are grey. All depths share one scale, near ones are bright.
    """
    columns = ["image", "truth", *examples[0].predictions]
    figure = _figure(1.7 * len(columns) + 1.6, 1.75 * len(examples) + 0.5)
    cells = figure.subplots(len(examples), len(columns), squeeze=False)
    classes = examples[0].truth.dtype == np.uint8
    truths = np.concatenate([example.truth.ravel() for example in examples])
    if classes:
        colours = colormaps["tab20"](np.arange(IGNORED + 1) % 20)[:, :3]
        colours[IGNORED] = 0.55
    else:
        scale = Normalize(np.nanmin(truths), np.nanmax(truths))
    for axes, example in zip(cells, examples, strict=True):
        for axis, shown in zip(axes, (example.image, example.truth, *example.predictions.values()), strict=True):
            axis.set(xticks=[], yticks=[], facecolor=LIGHT_GREY)
            if shown is example.image:
                axis.imshow(shown)
            elif classes:
                axis.imshow(colours[shown], interpolation="nearest")
            else:
                drawn = axis.imshow(shown, cmap="cividis_r", norm=scale, interpolation="nearest")
    for axis, name in zip(cells[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    if not classes:
        figure.colorbar(drawn, ax=cells[:, -1].tolist(), label="depth")
        return figure
    present = [k for k in np.unique(truths).tolist() if k != IGNORED][:MAX_ANNOTATED]
    handles = [Patch(color=colours[k], label=names[k] if k < len(names) else str(k)) for k in present]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def baseline_figure(results: Results) -> Figure:
    """The trained encoder, random ones with their deviation, and raw pixels side by side for every task."""
    bars: dict[str, Heights] = {"this encoder": [task.value for task in results.tasks]}
    for legend, name in ((RANDOM, "random"), ("raw pixels", "pixels")):
        bars[legend] = [task.baseline(name)[0] for task in results.tasks]
    deviations = [task.baseline("random")[1] for task in results.tasks]
    return bar_figure(results.tasks, bars, deviations, title=f"Beside its baselines: {results.source}")


def bar_figure(rows: Sequence[Heading], bars: Bars, deviations: Heights, *, title: str) -> Figure:
    """A group of bars for each of ``rows``, with their values; those called :data:`RANDOM` have ``deviations``.

    Errors, which have another unit and of which less is better, stand on an axis of their own.
    """
    parts = [
        part for errors in (False, True) if (part := [k for k, r in enumerate(rows) if r.lower_is_better == errors])
    ]
    widths = [0.7 + len(part) * (0.5 + 0.55 * len(bars)) for part in parts]
    figure = _figure(max(5.5, 0.8 + sum(widths)), 4.4)
    axes = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
    for axis, part in zip(axes, parts, strict=True):
        heights = {legend: [values[k] for k in part] for legend, values in bars.items()}
        _draw_bars(axis, heights, [deviations[k] for k in part] if deviations else [], rows[part[0]].digits - 1)
        axis.set_xticks(range(len(part)), [rows[k].title.replace(", ", "\n") for k in part], fontsize=9)
        axis.set_ylabel(", ".join(sorted({rows[k].unit or f"{rows[k].metric}, less is better" for k in part})))
    title = title if len(title) < 90 else "…" + title[-88:]
    axes[0].set_title(title, fontsize=11) if len(parts) == 1 else figure.suptitle(title, fontsize=11)
    handles, legends = axes[0].get_legend_handles_labels()
    figure.legend(handles, legends, loc="outside lower center", ncols=min(4, len(bars)), frameon=False)
    return figure


def _draw_bars(axis: Axes, bars: Bars, deviations: Heights, digits: int) -> None:
    width, colours = 0.8 / len(bars), itertools.cycle(PALETTE)
    for number, (legend, values) in enumerate(bars.items()):
        heights = np.array(values, float)  # None becomes NaN
        places = np.arange(len(heights)) + (number - (len(bars) - 1) / 2) * width
        spread, colour = ([value or 0.0 for value in deviations], GREY) if legend == RANDOM else (None, next(colours))
        drawn = axis.bar(places, heights, width * 0.92, color=colour, label=legend, yerr=spread, capsize=3)
        axis.bar_label(drawn, fmt=f"%.{digits}f", padding=2, fontsize=8)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(min(width, MAX_INCHES), min(height, MAX_INCHES)), layout="constrained")


def _unused(name: str, taken: Mapping[str, object]) -> str:
    """``name`` as a file's, with a number where it is taken."""
    name = re.sub(r"[^\w.-]+", "_", name)
    names = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return next(name for name in names if name not in taken)


def _heat_map(axis: Axes, cells: np.ndarray, ends: tuple[float, float], digits: int | None, missing: str) -> AxesImage:
    """Cells [rows, columns], NaN in grey, their values written out with ``digits`` unless that is None."""
    low, high = ends
    axis.set_facecolor(LIGHT_GREY)
    for (row, column), value in np.ndenumerate(cells) if digits is not None else ():
        text = f"{value:.{digits}f}" if np.isfinite(value) else missing
        colour = "white" if value - low < 0.5 * (high - low) else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return axis.imshow(cells, cmap="cividis", vmin=low, vmax=max(high, low + 1e-9))
