"""results.json: what an evaluation found, beside its baselines, and how to read it back."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Name

SCHEMA = 1
Head = dict[str, Any]
BASELINES = ("random", "pixels")
# What an entry of a grid says beside which head it is.
NOT_OF_THE_HEAD = ("features", "value", "deviation", "values")


@dataclass
class TaskResult:
    """One task on one label. Values are in ``unit``; of several heads the best is reported, for the baselines too."""

    task: str
    label: str
    metric: str
    unit: str
    value: float
    best_head: dict[str, Any]
    grid: list[dict[str, Any]]  # every head that was tried, each with its "value"
    # "random" and "pixels" -> "values": one for each seed; "grids": the whole grid of each; more beside it
    baselines: dict[str, dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    confusion: list[list[int]] | None = None  # rows are the true classes
    train_images: int = 0
    validation_images: int = 0
    seconds: float = 0.0
    images_per_second: float | None = None


@dataclass
class Results:
    """What stands in results.json."""

    source: str
    encoder: str  # which one was measured
    checkpoint_sha256: str | None
    versions: dict[str, str]
    config: dict[str, Any]
    options: dict[str, Any]
    tasks: list[TaskResult]
    schema: int = SCHEMA

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.partial-{os.getpid()}")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(temporary, path)


def read_results(path: str | Path) -> Results:
    """Read a results.json.

    Raises:
        UserError: it is not there, not JSON, or of another schema.
    """
    try:
        saved = json.loads(Path(path).read_text())
        if saved["schema"] != SCHEMA:
            raise UserError(
                f"{path} has schema {saved['schema']}, this version reads {SCHEMA}: evaluate the encoder again"
            )
        return Results(**{**saved, "tasks": [TaskResult(**task) for task in saved["tasks"]]})
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); make it with: python -m ijepa_ds evaluate"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the results of an evaluation ({error!r}); evaluate again") from None


def best_of(grid: list[dict[str, Any]], features: str | None = None) -> dict[str, Any] | None:
    """The entry of the highest value, among those on ``features`` if given; None where there is none."""
    return max(
        (head for head in grid if features in (None, head["features"])), key=lambda head: head["value"], default=None
    )


def format_table(tasks: list[TaskResult]) -> str:
    """A row for each task, label and kind of features: the encoder, random ones, pixels, and the margin over random.

    ``*`` marks the kind that is reported; each number is the best of its own heads.
    """
    table = [("label", "probe", "features", "trained", "random", "pixels", "margin over random", "head")]
    for result in tasks:
        pixels = max(result.baselines["pixels"]["values"])
        for features in dict.fromkeys(head["features"] for head in result.grid):
            best = best_of(result.grid, features)
            mark = "*" if features == result.best_head["features"] else " "
            random = random_values(result, features)
            deviation = best.get("deviation")
            trained = f"{best['value']:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
            cells = (
                f"{trained} {result.unit}",
                f"{_mean_and_deviation(random)} {result.unit}",
                f"{pixels:.2f} {result.unit}",
                format_margin(best["value"], random),
                " ".join(f"{key} {_short(best[key])}" for key in best if key not in NOT_OF_THE_HEAD),
            )
            table.append((result.label, result.task, features + mark, *cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 3 <= column < 7 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    notes = ["", "* is reported; each number is the best of its own heads"]
    if any(len(result.baselines["random"]["values"]) > 1 for result in tasks):
        notes.append("random: mean ± deviation over the random encoders, sd in the margin is that deviation")
    if any(head.get("deviation") is not None for result in tasks for head in result.grid):
        notes.append("lowshot, trained: mean ± deviation over the draws of labelled images")
    return "\n".join(["", *lines, *notes])


def random_values(result: TaskResult, features: str | None = None) -> list[float]:
    """The best value of each random encoder, among the heads on ``features`` if given."""
    grids = [best_of(grid, features) for grid in result.baselines["random"]["grids"]]
    return [best["value"] for best in grids if best is not None]


def margin(value: float, random: list[float]) -> tuple[float, float | None]:
    """``value`` less the random encoders' mean, and that in their deviations, where there are two of them."""
    difference = value - statistics.mean(random)
    return difference, difference / max(statistics.stdev(random), 1e-3) if len(random) > 1 else None


def format_margin(value: float, random: list[float]) -> str:
    """``+5.1 points = +7.3 sd``."""
    points, deviations = margin(value, random)
    return f"{points:+.1f} points" + (f" = {deviations:+.1f} sd" if deviations is not None else "")


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean of one or several values, and their standard deviation where there are several."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Measurement:
    """One task on one label for one encoder.

    ``grid``: every head tried, each with its "features" and "value". ``extra`` goes to the result where the encoder is
    the trained one; of the baselines' only what ``compared`` names.
    """

    task: str
    label: str
    grid: list[dict[str, Any]]
    train_images: int
    validation_images: int
    seconds: float
    images_per_second: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    confusion: list[list[int]] | None = None
    metric: str = "accuracy"
    unit: str = "%"


def combine(measured: list[tuple[Name, list[Measurement]]]) -> list[TaskResult]:
    """The results of all tasks that were measured for the trained encoder and for both baselines.

    Raises:
        AssertionError: a measurement of the trained encoder lacks a baseline.
    """
    by_name: dict[str, dict[tuple[str, str], list[Measurement]]] = {"trained": {}, "random": {}, "pixels": {}}
    for encoder, measurements in measured:
        for one in measurements:
            by_name[encoder.name].setdefault((one.task, one.label), []).append(one)
    results = []
    for key, (own,) in by_name["trained"].items():
        baselines = {}
        for name in BASELINES:
            found = by_name[name].get(key, [])
            assert found, f"{key} has no baseline '{name}'"
            baselines[name] = {
                "values": [best_of(one.grid)["value"] for one in found],
                "grids": [one.grid for one in found],
                **{item: [one.extra.get(item) for one in found] for item in own.compared},
            }
        best = best_of(own.grid)
        results.append(
            TaskResult(
                task=own.task,
                label=own.label,
                metric=own.metric,
                unit=own.unit,
                value=best["value"],
                best_head={name: value for name, value in best.items() if name not in ("value", "values")},
                grid=own.grid,
                baselines=baselines,
                extra=own.extra,
                confusion=own.confusion,
                train_images=own.train_images,
                validation_images=own.validation_images,
                seconds=own.seconds,
                images_per_second=own.images_per_second,
            )
        )
    return results
