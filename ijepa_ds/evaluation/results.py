"""results.json: what an evaluation measured, beside its baselines, and how to read it back."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ijepa_ds.errors import UserError
from ijepa_ds.files import replacing

Head = dict[str, Any]  # its "features", what else it was trained with, and the "value" that it reached
NOT_OF_THE_HEAD = ("features", "value", "deviation", "values")  # the last two: where "value" is a mean over draws


class Candidate(Protocol):
    """Whose features were measured; several may be called "random", one "trained" and one "pixels"."""

    @property
    def name(self) -> str: ...


class Baseline(TypedDict, total=False):
    """Random encoders, or raw pixels, beside one task: lists with an entry for each seed."""

    values: list[float]
    grids: list[list[Head]]
    mean_absolute_error: list[float]  # where labels are continuous


@dataclass(frozen=True, kw_only=True)
class _Measured:
    task: str
    label: str
    metric: str = "accuracy"
    unit: str = "%"
    train_images: int
    validation_images: int
    seconds: float = 0.0
    images_per_second: float | None = None
    grid: list[Head]
    extra: dict[str, Any] = field(default_factory=dict)
    confusion: list[list[int]] | None = None  # rows are the true classes


@dataclass(frozen=True, kw_only=True)
class Measurement(_Measured):
    """One task on one label for one candidate, with every head tried.

    Of the baselines' ``extra`` the result keeps only what ``compared`` names.
    """

    compared: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskResult(_Measured):
    """One task on one label: the trained encoder's measurement and its best head, beside the baselines."""

    value: float
    best_head: Head
    baselines: dict[str, Baseline]  # "random" and "pixels"

    def baseline(self, name: str) -> tuple[float | None, float | None]:
        """Mean and deviation of a baseline's values, one for each seed; None where it was not measured."""
        values = [value for value in self.baselines.get(name, {}).get("values", []) if math.isfinite(value)]
        return mean_and_deviation(values) if values else (None, None)


@dataclass(frozen=True)
class Results:
    """The contents of a results.json."""

    source: str
    encoder: str  # which one was measured
    checkpoint_sha256: str | None
    versions: dict[str, str]
    config: dict[str, Any]
    options: dict[str, Any]
    tasks: Annotated[list[TaskResult], Field(min_length=1)]
    schema: Literal[1] = 1

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_results(path: str | Path) -> Results:
    """Read a results.json; keys that this version does not know are left out.

    Raises:
        UserError: it is not there, something else, or of another schema.
    """
    try:
        return TypeAdapter(Results).validate_json(Path(path).read_bytes(), strict=True)
    except OSError as error:
        reason = str(error.strerror)
    except ValidationError as error:
        problem = min(error.errors(), key=lambda problem: problem["loc"] != ("schema",))  # which explains all others
        reason = ": ".join([".".join(map(str, problem["loc"])), problem["msg"]][not problem["loc"] :])
    raise UserError(f"{path} is not the results of an evaluation ({reason}); make it with: python -m ijepa_ds evaluate")


def combine(measured: Sequence[tuple[Candidate, list[Measurement]]]) -> list[TaskResult]:
    """The results of all tasks that were measured for the trained encoder and for both baselines."""
    results = []
    by_name = [(candidate.name, measurement) for candidate, measurements in measured for measurement in measurements]
    for trained in [measurement for name, measurement in by_name if name == "trained"]:
        key = trained.task, trained.label
        baselines: dict[str, Any] = {}
        for baseline in ("random", "pixels"):
            seeds = [seed for name, seed in by_name if name == baseline and (seed.task, seed.label) == key]
            assert seeds, f"{key} has no baseline '{baseline}'"
            baselines[baseline] = {
                "values": [best_of(seed.grid)["value"] for seed in seeds],
                "grids": [seed.grid for seed in seeds],
                **{item: [seed.extra[item] for seed in seeds] for item in trained.compared},
            }
        best = best_of(trained.grid)
        head = {name: value for name, value in best.items() if name not in ("value", "values")}
        shared = {shared.name: getattr(trained, shared.name) for shared in dataclasses.fields(_Measured)}
        results.append(TaskResult(**shared, value=best["value"], best_head=head, baselines=baselines))
    return results


def best_of(grid: list[Head], features: str | None = None) -> Head:
    """The head of the highest value, among those on ``features`` if given."""
    return max((head for head in grid if features in (None, head["features"])), key=lambda head: head["value"])


def random_values(result: TaskResult, features: str | None = None) -> list[float]:
    """The best value of each random encoder, among the heads on ``features`` if given."""
    return [best_of(grid, features)["value"] for grid in result.baselines["random"]["grids"]]


def margin(value: float, random: list[float]) -> tuple[float, float | None]:
    """``value`` less the random encoders' mean, and that in their deviations, where there are two of them."""
    mean, deviation = mean_and_deviation(random)
    return value - mean, None if deviation is None else (value - mean) / max(deviation, 1e-3)


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean of one or several values, and their standard deviation where there are several."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def format_table(tasks: list[TaskResult]) -> str:
    """A row for each task, label and kind of features: the encoder, random ones, pixels, and the margin over random.

    ``*`` marks the kind that is reported; each number is the best of its own heads.
    """
    rows = [["label", "probe", "features", "trained", "random", "pixels", "margin over random", "head"]]
    for result in tasks:
        for features in dict.fromkeys(head["features"] for head in result.grid):
            best, random = best_of(result.grid, features), random_values(result, features)
            mark = "*" if features == result.best_head["features"] else " "
            points, deviations = margin(best["value"], random)
            row = [result.label, result.task, features + mark]
            row.append(f"{format_value(best['value'], best.get('deviation'))} {result.unit}")
            row.append(f"{format_value(*mean_and_deviation(random))} {result.unit}")
            row.append(f"{max(result.baselines['pixels']['values']):.2f} {result.unit}")
            row.append(f"{points:+.1f} points" + (f" = {deviations:+.1f} sd" if deviations is not None else ""))
            row.append(" ".join(f"{key} {_short(best[key])}" for key in best if key not in NOT_OF_THE_HEAD))
            rows.append(row)
    notes = ["", "* is reported; each number is the best of its own heads"]
    if any(len(result.baselines["random"]["values"]) > 1 for result in tasks):
        notes.append("random: mean ± deviation over the random encoders, sd in the margin is that deviation")
    if any(head.get("deviation") is not None for result in tasks for head in result.grid):
        notes.append("lowshot, trained: mean ± deviation over the draws of labelled images")
    return "\n".join(["", *aligned(rows, numbers=range(3, 7)), *notes])


def aligned(rows: list[list[str]], numbers: range) -> list[str]:
    """A line for each row; columns of ``numbers`` stand at the right of their width, texts at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = "  ".join(f"{{:{'>' if column in numbers else '<'}{width}}}" for column, width in enumerate(widths))
    return [layout.format(*row).rstrip() for row in rows]


def format_value(value: float, deviation: float | None) -> str:
    """``71.20 ± 0.35``, or ``71.20`` of a single one."""
    return f"{value:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
