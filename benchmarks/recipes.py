"""What recipes are worth: a grid of (recipe, seed), each trained and evaluated, and one table of what came of it.

    python benchmarks/recipes.py benchmarks/recipes/masks_cifar10.json --folder runs/masks --jobs 2 \
        --set ijepa.data.train=data/fit.beton --set ijepa.data.validation=data/heldout.beton --json masks.json

A grid file names a configuration, settings that all have in common, recipes (more settings, by name; the first is what
the others are compared with), seeds, and options of the evaluation. Each (recipe, seed) is a job: run.py, then
``python -m ijepa_ds evaluate``, with one thread each. All of the first seed come before those of the next.

Stop it with SIGTERM or Ctrl-C, or kill it: the same command goes on. Runs go on from their checkpoints, what is
finished is not done again. Whatever is finished is in ``table.md`` of the folder, at any time.

Only the first job measures all the random encoders that the evaluation is asked for, the others one each.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Annotated

import measure
import recipe_table
import torch
from pydantic import Field
from recipe_jobs import Bench, Commands, Job, say

from ijepa_ds.build import build_sampler
from ijepa_ds.config import load_config
from ijepa_ds.errors import UserError, listing, run_command
from ijepa_ds.evaluation.command import build_parser, check_options
from ijepa_ds.files import replacing
from ijepa_ds.run.lock import hold, release
from ijepa_ds.validation import Checked, must, nearest, read_json

Name = Annotated[
    str, must(lambda name: re.fullmatch(r"[\w.+-]+", name) is not None, "must be made of letters, digits, _ . + and -")
]


class Grid(Checked):
    """A file of ``benchmarks/recipes/``; ``config`` is relative to the project's folder."""

    about: str = ""
    config: str
    common: list[str] = Field(default=[])
    recipes: Annotated[dict[Name, list[str]], Field(min_length=1)]
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    evaluate: list[str] = Field(default=[])


def main(arguments: list[str] | None = None, commands: Commands | None = None) -> int:
    """The command line; 1 where not every job is finished."""
    options = parse(arguments)
    grid = read_json(Grid, options.grid, "is not a grid of recipes")
    jobs = jobs_of(grid, options)
    wanted = [job for job in jobs if is_wanted(job, options)]
    check(wanted)
    hold(options.folder)  # two benchmarks would train the same runs
    try:
        write = partial(write_table, jobs, grid, options)
        bench = Bench(wanted, commands or Commands(), options.jobs, options.every, write)
        complete = options.only_table or bench.run()
        print("\n" + write(), flush=True)
    finally:
        release(options.folder)
    if bench.failed:
        say(f"{len(bench.failed)} of {len(wanted)} jobs have failed: {', '.join(bench.failed)}")
    return 0 if complete else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_argument = parser.add_argument
    add_argument("grid", type=Path, metavar="GRID.json", help="a file of benchmarks/recipes/")
    add_argument("--folder", type=Path, required=True, help="for the runs NAME_seedN, jobs/ (their logs) and table.md")
    add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="for all runs: ijepa.data.train=FILE")
    add_argument("--jobs", type=int, default=1, metavar="N", help="at a time, with one thread each (default 1)")
    add_argument("--only", nargs="+", metavar="RECIPE", help="of these recipes")
    add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the file's")
    add_argument("--clock", choices=list(recipe_table.SECONDS), default="processor", help="what costs are told by")
    add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between lines on progress (default 60)")
    add_argument("--only-table", action="store_true", help="of what is finished; nothing is run")
    add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs = {options.jobs} must be at least 1")
    return options


def jobs_of(grid: Grid, options: argparse.Namespace) -> list[Job]:
    """All jobs, the first seed's before those of the next."""
    names = list(grid.recipes)
    if unknown := [recipe for recipe in options.only or names if recipe not in grid.recipes]:
        raise UserError(f"--only {unknown[0]}: {options.grid} has no such recipe{nearest(unknown[0], names)}")
    first, one_random = (names[0], grid.seeds[0]), ["--random-seeds", "1"]  # the evaluation insists on one
    return [
        Job(
            recipe=recipe,
            seed=seed,
            config=measure.ROOT / grid.config,
            settings=[*grid.common, *options.set, *grid.recipes[recipe], f"ijepa.run.seed={seed}"],
            evaluation=[*grid.evaluate, *([] if (recipe, seed) == first else one_random)],
            folder=options.folder,
        )
        for seed in dict.fromkeys([*grid.seeds, *(options.seeds or [])])
        for recipe in names
    ]


def is_wanted(job: Job, options: argparse.Namespace) -> bool:
    """Whether a job is among those asked for; the table has the others too, where they are finished."""
    return (not options.only or job.recipe in options.only) and (not options.seeds or job.seed in options.seeds)


def check(jobs: list[Job]) -> None:
    """Refuse what a program would refuse, before the first one is started, and runs of other settings."""
    checked = set()
    for job in jobs:
        if job.recipe not in checked:
            checked.add(job.recipe)  # its other seeds differ in nothing else
            try:
                build_sampler(load_config(job.config, job.settings))
            except UserError as error:
                raise UserError(f"recipe {job.recipe}: {error}") from None
        trained = job.record().trained
        if trained is not None and trained != job.identity():
            differing = sorted({*trained} ^ {*job.identity()}) or ["the order of its settings"]
            raise UserError(
                f"{job.run} was trained with other settings: choose another --folder, or remove it and "
                f"{job.log.with_suffix('.json')} to train it anew. What differs:{listing(differing)}"
            )
    for evaluation in {tuple(job.evaluation) for job in jobs}:
        check_options(build_parser().parse_args(["--checkpoint", "RUN", *evaluation]))


def write_table(jobs: list[Job], grid: Grid, options: argparse.Namespace) -> str:
    """The table of what is finished, which is written to ``table.md`` and as JSON where that is asked for."""
    outcomes: dict[str, list[recipe_table.Outcome]] = {recipe: [] for recipe in grid.recipes}
    for job in filter(Job.is_evaluated, jobs):
        outcome = recipe_table.read_outcome(job.recipe, job.seed, job.run, job.results, clock=options.clock)
        outcomes[job.recipe].append(outcome)
    text = recipe_table.markdown(outcomes, clock=options.clock, about=grid.about)
    with replacing(options.folder / "table.md") as unfinished:
        unfinished.write_text(text)
    kept = {"grid": grid.model_dump(), "set": options.set, **recipe_table.as_json(outcomes)}
    measure.save(measure.record(kept, compared=__doc__, device=torch.device("cpu")), options.json)
    return text


if __name__ == "__main__":
    run_command(main)
