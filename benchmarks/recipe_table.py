"""The table of ``recipes.py``: what runs have logged and their evaluations measured, over recipes and seeds.

The runs' own records are read, so that the table can be made at any time, of whatever is finished.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import measure

from ijepa_ds.evaluation.results import Results, best_of, format_value, mean_and_deviation, read_results
from ijepa_ds.validation import NotJSON, load_json, parse_json

Clock = Literal["processor", "wall"]
SECONDS: dict[Clock, str] = {"processor": "processor_seconds", "wall": "step_seconds"}  # of a step, as a run logs them
_KNN = "knn/"  # of the online probe, before the label's name
_TASKS = ("knn", "logistic", "linear")  # first of the columns, in this order; any other comes after them
Probe = tuple[str, str]  # a task of the evaluation and the features it is given: ("knn", "last")
Curve = list[tuple[float, float]]  # images seen, accuracy


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run's ``metrics.jsonl`` says of it.

    ``seconds``: of an image, the median of the logged windows; ``curves``: of the online kNN, by label.
    """

    images: float
    seconds: float | None
    rankme: float | None
    curves: dict[str, Curve]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished job: a run, and its evaluation's values by label and probe, beside the baselines'.

    ``random`` has those of each random encoder, by the seed that it was drawn with; ``commit``: that the run was last
    started with, None where it is not known.
    """

    recipe: str
    seed: int
    trained: Trained
    values: dict[str, dict[Probe, float]]
    random: dict[str, dict[Probe, dict[int, float]]]
    pixels: dict[str, dict[str, float]]  # label -> task -> value: they have one kind of features
    commit: str | None = None


def read_outcome(recipe: str, seed: int, run: Path, results: Path, *, clock: Clock) -> Outcome:
    """Of one job.

    Raises:
        UserError: its results cannot be read.
    """
    trained, found = read_metrics(run / "metrics.jsonl", clock=clock), evaluated(read_results(results))
    return Outcome(recipe=recipe, seed=seed, trained=trained, commit=_commit(run / "config.json"), **found)


def _commit(path: Path) -> str | None:
    try:
        commit = load_json(path)["commit"]
    except (OSError, NotJSON, KeyError, TypeError):
        return None
    return commit if isinstance(commit, str) else None


def evaluated(results: Results) -> dict[str, Any]:
    """``values``, ``random`` and ``pixels`` of an :class:`Outcome`."""
    values: dict[str, dict[Probe, float]] = {}
    random: dict[str, dict[Probe, dict[int, float]]] = {}
    pixels: dict[str, dict[str, float]] = {}
    first = results.config["ijepa"]["run"].get("seed", 0)
    for task in results.tasks:
        for features in dict.fromkeys(head["features"] for head in task.grid):
            probe = task.task, features
            values.setdefault(task.label, {})[probe] = best_of(task.grid, features)["value"]
            grids = task.baselines["random"]["grids"]
            found = {first + index: best_of(grid, features)["value"] for index, grid in enumerate(grids)}
            random.setdefault(task.label, {})[probe] = found
        pixels.setdefault(task.label, {})[task.task] = max(task.baselines["pixels"]["values"])
    return {"values": values, "random": random, "pixels": pixels}


def read_metrics(path: Path, *, clock: Clock = "processor") -> Trained:
    """Read a run's log, of one attempt or of many: each step stands in it once."""
    seconds: list[float] = []
    points: dict[str, Curve] = {}
    rankme, step, batch = None, 0, math.nan
    for line in _lines(path):
        step = line["step"]
        if line.get("step_seconds"):
            batch = line["images_per_second"] * line["step_seconds"]
            if (of_step := line.get(SECONDS[clock])) is not None:
                seconds.append(of_step / batch)
        rankme = line.get("rankme") or rankme
        for name, value in line.items():
            if name.startswith(_KNN) and value is not None:
                points.setdefault(name.removeprefix(_KNN), []).append((step, value))
    return Trained(
        images=step * batch,
        seconds=statistics.median(seconds) if seconds else None,
        rankme=rankme,
        curves={label: [(at * batch, value) for at, value in curve] for label, curve in points.items()},
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            line = parse_json(text)
        except NotJSON:
            continue  # being written
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def at_images(curve: Curve, images: float) -> float | None:
    """The accuracy after so many images, on the straight line between two measurements; None outside of them."""
    for (begin, low), (end, high) in itertools.pairwise(curve):
        if begin <= images <= end:
            return high if end == begin else low + (high - low) * (images - begin) / (end - begin)
    return curve[-1][1] if curve and math.isclose(curve[-1][0], images) else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe's line in the table of a label: lists have a number for each seed that has one.

    ``cost``: times the first recipe's seconds of an image. ``equal_images``, ``equal_time``: the online kNN at the end,
    and after as many images as the time of the first recipe's run is enough for; ``cheaper`` where it is enough for
    more images than the run has seen, so that its last accuracy stands there.
    """

    recipe: str
    seeds: list[int]
    cost: float | None
    cheaper: bool
    equal_images: list[float]
    equal_time: list[float]
    values: dict[Probe, list[float]]
    rankme: list[float]


def rows_of(label: str, outcomes: Mapping[str, list[Outcome]]) -> list[Row]:
    """A line for each recipe, in their order; the first one is what costs are compared with."""
    first = _cost(next(iter(outcomes.values()), []))
    return [_row(recipe, label, found, first) for recipe, found in outcomes.items() if found]


def _row(recipe: str, label: str, found: list[Outcome], first: float | None) -> Row:
    own = _cost(found)
    cost = own / first if own and first else None
    ends: list[float] = []
    at_time: list[float] = []
    for outcome in found:
        if curve := outcome.trained.curves.get(label):
            ends.append(curve[-1][1])
            value = None if cost is None else at_images(curve, curve[-1][0] / max(cost, 1.0))
            at_time += [] if value is None else [value]
    probes = dict.fromkeys(probe for outcome in found for probe in outcome.values.get(label, {}))
    values = {probe: [o.values[label][probe] for o in found if probe in o.values.get(label, {})] for probe in probes}
    return Row(
        recipe=recipe,
        seeds=[outcome.seed for outcome in found],
        cost=cost,
        cheaper=cost is not None and cost < 1,
        equal_images=ends,
        equal_time=at_time,
        values=values,
        rankme=[outcome.trained.rankme for outcome in found if outcome.trained.rankme is not None],
    )


def _cost(outcomes: Iterable[Outcome]) -> float | None:
    """Seconds of an image, the mean over seeds."""
    seconds = [outcome.trained.seconds for outcome in outcomes if outcome.trained.seconds is not None]
    return statistics.mean(seconds) if seconds else None


def labels_of(outcomes: Mapping[str, list[Outcome]]) -> list[str]:
    """The labels that were evaluated, in the order of the first that has them."""
    return list(dict.fromkeys(label for found in outcomes.values() for outcome in found for label in outcome.values))


def baselines(label: str, outcomes: Mapping[str, list[Outcome]]) -> tuple[dict[Probe, list[float]], dict[str, float]]:
    """Of the first recipe that is there: random encoders' values, each seed's once, and raw pixels'."""
    found = next((found for found in outcomes.values() if found), [])
    random: dict[Probe, dict[int, float]] = {}
    pixels: dict[str, float] = {}
    for outcome in found:
        for probe, values in outcome.random.get(label, {}).items():
            random[probe] = values | random.get(probe, {})
        pixels = outcome.pixels.get(label, {}) | pixels
    return {probe: list(values.values()) for probe, values in random.items()}, pixels


def markdown(outcomes: Mapping[str, list[Outcome]], *, clock: Clock, about: str = "") -> str:
    """All tables, one a label, under a head that says what the columns are."""
    parts = [_head(next(iter(outcomes), ""), clock, about)]
    for label in labels_of(outcomes):
        parts += [f"## {label}", _table(label, outcomes)]
    return "\n\n".join(parts) + "\n"


def _head(first: str, clock: Clock, about: str) -> str:
    what = {
        "processor": "processor seconds of the training process for an image (all its threads; start, compilation, "
        "probes, checkpoints and waiting for a core are left out): runs side by side cannot be timed by the wall clock",
        "wall": "seconds of training for an image by the wall clock, start, compilation, probes and checkpoints left "
        "out: of worth only where nothing else ran",
    }
    paragraphs = [
        about,
        f"cost: {what[clock]}; the median of a run's logged windows, as a ratio to `{first}`. kNN online: the run's "
        "own probe (k = 20, features `last`, on as many images as its configuration says), at the end of training "
        "(equal images), and after images / cost images, on straight lines between measurements: what the time of a "
        f"run of `{first}` is enough for (equal time; `*`: a cheaper recipe, whose last accuracy stands there). A "
        "costlier recipe is read before its learning rate is down, which is to its disadvantage. Other columns: the "
        "evaluation of the last checkpoint, the best of each probe's heads, in %; `last`, `last4`: the features. "
        "rank: the last RankMe of the run's log, over at most 256 images of a micro-batch: compare equal micro-batches "
        f"only. Mean ± deviation over seeds; random encoders: over theirs, with `{first}`'s encoder.",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _table(label: str, outcomes: Mapping[str, list[Outcome]]) -> str:
    rows = rows_of(label, outcomes)
    probes = sorted(dict.fromkeys(probe for row in rows for probe in row.values), key=_place)
    random, pixels = baselines(label, outcomes)
    header = ["recipe", "seeds", "cost", "kNN online, equal images", "equal time"]
    lines: list[list[Any]] = [
        [
            row.recipe,
            len(row.seeds),
            "-" if row.cost is None else f"{row.cost:.2f}",
            _spread(row.equal_images),
            _spread(row.equal_time) + ("*" if row.cheaper and row.equal_time else ""),
            *(_spread(row.values.get(probe, [])) for probe in probes),
            _spread(row.rankme),
        ]
        for row in rows
    ]
    count = max(map(len, random.values()), default=0)
    lines.append(["random encoders", count, *"---", *(_spread(random.get(probe, [])) for probe in probes), "-"])
    shown = [format_value(pixels.get(task)) if features == "last" else "-" for task, features in probes]
    lines.append(["raw pixels", *"----", *shown, "-"])
    return measure.table(lines, [*header, *(f"{task} {features}" for task, features in probes), "rank"])


def _place(probe: Probe) -> tuple[int, str, str]:
    return _TASKS.index(probe[0]) if probe[0] in _TASKS else len(_TASKS), *probe


def _spread(values: list[float]) -> str:
    return format_value(*mean_and_deviation(values)) if values else "-"


def as_json(outcomes: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """Everything behind the table: the lines of each label, and each job's own numbers."""
    lines = {label: [_plain(row) for row in rows_of(label, outcomes)] for label in labels_of(outcomes)}
    jobs = [
        {
            "recipe": outcome.recipe,
            "seed": outcome.seed,
            "commit": outcome.commit,
            "trained": dataclasses.asdict(outcome.trained),
            "values": _by_name(outcome.values),
            "random": _by_name(outcome.random),
            "pixels": outcome.pixels,
        }
        for found in outcomes.values()
        for outcome in found
    ]
    return {"rows": lines, "jobs": jobs}


def _plain(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "values": {" ".join(probe): values for probe, values in row.values.items()}}


def _by_name(values: Mapping[str, Mapping[Probe, Any]]) -> dict[str, dict[str, Any]]:
    return {label: {" ".join(probe): value for probe, value in found.items()} for label, found in values.items()}
