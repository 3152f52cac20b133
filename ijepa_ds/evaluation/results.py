"""results.json: what an evaluation measured, beside its baselines, and how to read it back."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ijepa_ds.errors import UserError
from ijepa_ds.files import replacing
from ijepa_ds.validation import NotJSON, load_json, reason

Head = dict[str, Any]  # its "features", what else it was trained with, and the "value" that it reached
NOT_OF_THE_HEAD = ("features", "value", "deviation", "values", "pixel_accuracy")  # results, and not of its making
RMSE = "RMSE"  # the metric of which less is better


class Baseline(TypedDict, total=False):
    """Random encoders, or raw pixels, beside one task: lists with an entry for each seed."""

    values: list[float]
    grids: list[list[Head]]
    mean_absolute_error: list[float]  # where labels are continuous


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A task on a label, and what its values are."""

    task: str
    label: str
    metric: str = "accuracy"
    unit: str = "%"

    @property
    def title(self) -> str:
        """The name of the task, and the label's where that says more."""
        return self.task if self.label in ("label", self.task) else f"{self.task}, {self.label}"

    @property
    def lower_is_better(self) -> bool:
        """Whether the values are errors."""
        return self.metric == RMSE

    @property
    def digits(self) -> int:
        """Digits after the point that are shown."""
        return 3 if self.metric == RMSE else 2


@dataclass(frozen=True, kw_only=True)
class Measurement(Heading):
    """One task on one label for one candidate, with every head tried."""

    train_images: int
    validation_images: int
    seconds: float = 0.0
    images_per_second: float | None = None
    grid: list[Head]
    extra: dict[str, Any] = field(default_factory=dict)
    confusion: list[list[int]] | None = None  # rows are the true classes


@dataclass(frozen=True, kw_only=True)
class TaskResult(Measurement):
    """The trained encoder's measurement and its best head, beside the baselines."""

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
        raw = load_json(path, nan=True)  # of a head that diverged
        return TypeAdapter(Results).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problem = min(error.errors(), key=lambda problem: problem["loc"] != ("schema",))  # which explains all others
        why = ": ".join([".".join(map(str, problem["loc"])), problem["msg"]][not problem["loc"] :])
    except (OSError, NotJSON) as error:
        why = reason(error)
    raise UserError(f"{path} is not the results of an evaluation ({why}); make it with: python -m ijepa_ds evaluate")


def combine(measured: Mapping[str, list[Measurement]]) -> list[TaskResult]:
    """The results of all tasks that were measured for the trained encoder and for both baselines, by their names."""
    results = []
    for trained in measured["trained"]:
        key, baselines = (trained.task, trained.label), dict[str, Baseline]()
        for name in ("random", "pixels"):
            seeds = [seed for seed in measured.get(name, []) if (seed.task, seed.label) == key]
            assert seeds, f"{key} has no baseline '{name}'"
            grids = [seed.grid for seed in seeds]
            values = [best_of(grid, lower=trained.lower_is_better)["value"] for grid in grids]
            baselines[name] = {"values": values, "grids": grids}
            if "mean_absolute_error" in trained.extra:
                baselines[name]["mean_absolute_error"] = [seed.extra["mean_absolute_error"] for seed in seeds]
        best = best_of(trained.grid, lower=trained.lower_is_better)
        head = {key: value for key, value in best.items() if key not in ("value", "values")}
        results.append(TaskResult(**vars(trained), value=best["value"], best_head=head, baselines=baselines))
    return results


def best_of(grid: list[Head], features: str | None = None, *, lower: bool = False) -> Head:
    """The head of the highest value, or of the ``lower``, among those on ``features`` if given."""
    best = min if lower else max
    return best((head for head in grid if features in (None, head["features"])), key=lambda head: head["value"])


def random_values(result: TaskResult, features: str) -> list[float]:
    """The best value of each random encoder, among the heads on ``features``."""
    lower = result.lower_is_better
    return [best_of(grid, features, lower=lower)["value"] for grid in result.baselines["random"]["grids"]]


def margin(value: float, random: list[float]) -> tuple[float, float | None]:
    """``value`` less the random encoders' mean, and that in their deviations, where there are two of them."""
    mean, deviation = mean_and_deviation(random)
    return value - mean, None if deviation is None else (value - mean) / max(deviation, 1e-3)


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean of values, and their standard deviation where there are several."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def format_table(tasks: list[TaskResult]) -> str:
    """A row for each task, label and kind of features: the encoder, random ones, pixels, and the margin over random.

    ``*`` marks the kind that is reported; each number is the best of its own heads.
    """
    rows = [["label", "probe", "features", "trained", "random", "pixels", "margin over random", "head"]]
    for result in tasks:
        for features in dict.fromkeys(head["features"] for head in result.grid):
            lower, digits = result.lower_is_better, result.digits
            best, random = best_of(result.grid, features, lower=lower), random_values(result, features)
            points, deviations = margin(best["value"], random)
            pixels = (min if lower else max)(result.baselines["pixels"]["values"])
            numbers = (best["value"], best.get("deviation")), mean_and_deviation(random), (pixels, None)
            head = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in best.items()}
            mark = "*" if features == result.best_head["features"] else " "
            rows.append([result.label, result.task, features + mark])
            rows[-1] += [f"{format_value(*number, digits=digits)} {result.unit}".rstrip() for number in numbers]
            rows[-1].append(
                (f"{points:+.3f}" if lower else f"{points:+.1f} points")
                + (f" = {deviations:+.1f} sd" if deviations is not None else "")
            )
            rows[-1].append(" ".join(f"{key} {head[key]}" for key in head if key not in NOT_OF_THE_HEAD))
    notes = ["", "* is reported; each number is the best of its own heads"]
    if any(len(result.baselines["random"]["values"]) > 1 for result in tasks):
        notes.append("random: mean ± deviation over the random encoders, sd in the margin is that deviation")
    if any(head.get("deviation") is not None for result in tasks for head in result.grid):
        notes.append("lowshot, trained: mean ± deviation over the draws of labelled images")
    alone = {result.label: result for result in tasks if "position_alone" in result.extra}
    for label, result in alone.items():
        value = format_value(result.extra["position_alone"], digits=result.digits)
        notes.append(f"{label}: a patch's position alone, without the image, gives {value} {result.unit}".rstrip())
    if any(result.lower_is_better for result in tasks):
        notes.append(f"{RMSE}: an error in the depth maps' own unit, so less is better and a margin below 0 a gain")
    return "\n".join(["", *aligned(rows, numbers=range(3, 7)), *notes])


def aligned(rows: list[list[str]], numbers: range) -> list[str]:
    """A line for each row; columns of ``numbers`` stand at the right of their width, texts at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = "  ".join(f"{{:{'>' if column in numbers else '<'}{width}}}" for column, width in enumerate(widths))
    return [layout.format(*row).rstrip() for row in rows]


def format_value(value: float | None, deviation: float | None = None, *, digits: int = 2) -> str:
    """``71.20 ± 0.35``, ``71.20`` of a single one, or a dash of none."""
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return "-" if value is None else f"{value:.{digits}f}{spread}"
