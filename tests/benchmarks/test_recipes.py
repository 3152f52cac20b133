"""The benchmark of recipes: its table's arithmetic on made-up runs, and its jobs with stubs for the two programs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import recipe_jobs
import recipe_table
import recipes
from recipe_jobs import Bench, Commands, Job, Running
from recipe_table import Outcome, Trained, at_images

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.results import read_results

STORED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "2026-11-21_cifar10_tiny_seed0.json"


def made_up(recipe: str, seed: int, *, seconds: float, knn: list[float], linear: float = 50.0) -> Outcome:
    """A run of 100 images a measurement of its kNN."""
    curve = [(100.0 * number, value) for number, value in enumerate(knn)]
    return Outcome(
        recipe=recipe,
        seed=seed,
        trained=Trained(images=curve[-1][0], seconds=seconds, rankme=10.0 + seed, curves={"label": curve}),
        values={"label": {("linear", "last4"): linear, ("knn", "last"): knn[-1]}},
        random={"label": {("linear", "last4"): {seed: 20.0 + seed, seed + 1: 21.0 + seed}}},
        pixels={"label": {"linear": 33.0}},
    )


# ------------------------------------------------------------------------------------------------ the table


def test_an_accuracy_is_read_off_straight_lines_within_the_curve_alone() -> None:
    curve = [(100.0, 10.0), (200.0, 30.0), (400.0, 40.0)]
    assert [at_images(curve, images) for images in (100, 150, 200, 300, 400)] == [10, 20, 30, 35, 40]
    assert at_images(curve, 50) is None and at_images(curve, 401) is None
    assert at_images([(100.0, 7.0)], 100) == 7 and at_images([], 100) is None


def test_equal_time_is_what_the_first_recipes_time_is_enough_for() -> None:
    outcomes = {
        "plain": [
            made_up("plain", 0, seconds=0.9, knn=[10, 20, 30, 40]),
            made_up("plain", 1, seconds=1.1, knn=[10, 20, 30, 50]),
        ],
        "twice": [
            made_up("twice", 0, seconds=2.1, knn=[10, 20, 40, 60]),
            made_up("twice", 1, seconds=1.9, knn=[10, 30, 40, 61]),
        ],
        "cheaper": [made_up("cheaper", 0, seconds=0.5, knn=[10, 20, 30, 36])],
        "unfinished": [],
    }
    plain, twice, cheaper = recipe_table.rows_of("label", outcomes)
    assert (plain.cost, plain.equal_images, plain.equal_time) == (1.0, [40, 50], [40, 50]) and not plain.cheaper
    assert twice.cost == pytest.approx(2.0) and twice.equal_images == [60, 61]
    assert twice.equal_time == pytest.approx([30, 35])  # after 150 of 300 images
    assert cheaper.cost == 0.5 and cheaper.cheaper and cheaper.equal_time == [36]
    assert twice.rankme == [10, 11] and twice.values[("linear", "last4")] == [50, 50]

    text = recipe_table.markdown(outcomes, clock="processor", about="About it.")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    titles = ["recipe", "seeds", "cost", "kNN online, equal images", "equal time", "knn last", "linear last4", "rank"]
    assert cells[0] == titles
    assert cells[2][:5] == ["plain", "2", "1.00", "45.00 ± 7.07", "45.00 ± 7.07"]
    assert cells[3][:5] == ["twice", "2", "2.00", "60.50 ± 0.71", "32.50 ± 3.54"]
    assert cells[4][:5] == ["cheaper", "1", "0.50", "36.00", "36.00*"]
    # Encoder 1 was measured by both runs of `plain`, and counts once.
    assert cells[5] == ["random encoders", "3", "-", "-", "-", "-", "21.00 ± 1.00", "-"]
    assert cells[6] == ["raw pixels", "-", "-", "-", "-", "-", "-", "-"]
    assert text.startswith("About it.\n") and "processor seconds" in text and "`plain`" in text


def test_costs_that_no_run_has_logged_are_left_out() -> None:
    (row,) = recipe_table.rows_of("label", {"plain": [made_up("plain", 0, seconds=0.0, knn=[10, 20])]})
    assert row.cost is None and row.equal_time == [] and row.equal_images == [20]


def test_a_runs_log_gives_cost_curve_and_rank(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "knn/label": 10.0, "knn/colour": None}]
    for step, seconds in ((10, 4.0), (20, 6.0), (30, 50.0)):  # another program had the cache
        rates = {"images_per_second": 16.0, "step_seconds": 0.5, "processor_seconds": seconds}
        lines.append({"step": step, "loss": 0.1, **rates})
    lines += [{"step": 30, "rankme": 5.5, "knn/label": 20.0}, {"step": 31, "rankme": None}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 32, "lo')
    found = recipe_table.read_metrics(tmp_path / "metrics.jsonl")
    assert found == Trained(images=31 * 8, seconds=6.0 / 8, rankme=5.5, curves={"label": [(8.0, 10.0), (240.0, 20.0)]})
    assert recipe_table.read_metrics(tmp_path / "metrics.jsonl", clock="wall").seconds == 0.5 / 8


def test_an_evaluations_results_are_taken_by_features() -> None:
    found = recipe_table.evaluated(read_results(STORED))
    assert found["values"]["label"]["linear", "last4"] == pytest.approx(45.43)
    assert found["values"]["label"]["knn", "last"] == pytest.approx(42.35)
    assert found["values"]["label"]["linear", "last"] < 45.43
    assert list(found["random"]["label"]["logistic", "last4"]) == [0, 1, 2]  # their seeds
    assert max(found["random"]["label"]["logistic", "last4"].values()) == pytest.approx(45.82)
    assert found["pixels"]["label"]["knn"] == pytest.approx(36.3)


# ------------------------------------------------------------------------------------------------ the jobs

TRAIN = """
import json, os, signal, sys, time
sets = dict(argument.split("=", 1) for argument in sys.argv if argument.startswith("ijepa."))
folder, name = sets["ijepa.run.folder"], sets["ijepa.run.name"]
os.makedirs(f"{folder}/{name}", exist_ok=True)
open(f"{folder}/calls", "a").write(f"train {name}\\n")
assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["IJEPA_STARTER"] == str(os.getppid())
if sets.get("ijepa.broken") == "true" and not os.path.exists(f"{folder}/mended"):
    print("one line"); sys.exit("error: it is broken")
if sets.get("ijepa.slow") == "true" and not os.path.exists(f"{folder}/{name}/saved"):
    def stop(*_):
        open(f"{folder}/{name}/saved", "w").close(); print("stopped by SIGTERM after step 3"); sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    print("step 3/8  epoch 0.10  loss 0.2  wait 1%  240 img/s  left 00m 05s", flush=True)
    open(f"{folder}/{name}/begun", "w").close()
    time.sleep(30)
speed = {"images_per_second": 4.0, "step_seconds": 1.0, "processor_seconds": 2.0}
lines = [{"step": 1, "knn/label": 10.0}, {"step": 8, "knn/label": 40.0, "rankme": 6.0, **speed}]
open(f"{folder}/{name}/metrics.jsonl", "w").write("\\n".join(map(json.dumps, lines)))
open(f"{folder}/{name}/config.json", "w").write('{"commit": "abc"}')
print("done: 8 steps, in it")
"""
EVALUATE = """
import os, sys
run, out = (sys.argv[sys.argv.index(option) + 1] for option in ("--checkpoint", "--out"))
open(f"{os.path.dirname(run)}/calls", "a").write(f"evaluate {os.path.basename(run)}\\n")
os.makedirs(out, exist_ok=True)
open(f"{out}/results.json", "w").write(open(%r).read())
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Commands:
    """The two programs, which note in ``calls`` that they were called."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "evaluate.py").write_text(EVALUATE % str(STORED))
    return Commands(*[(sys.executable, "-S", str(tmp_path / f"{name}.py")) for name in ("train", "evaluate")])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_jobs, "POLL_SECONDS", 0.01)


def job(folder: Path, recipe: str, *settings: str, evaluation: list[str] | None = None) -> Job:
    (folder / "config.json").write_text("{}")
    return Job(
        recipe=recipe,
        seed=0,
        config=folder / "config.json",
        settings=list(settings),
        evaluation=evaluation or [],
        folder=folder,
    )


def calls(folder: Path) -> list[str]:
    """What was called since the last look."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    (folder / "calls").unlink(missing_ok=True)
    return lines


def test_a_failed_job_is_named_with_its_log_and_the_others_go_on(tmp_path: Path, stubs: Commands, capsys) -> None:
    jobs = [job(tmp_path, "broken", "ijepa.broken=true"), job(tmp_path, "plain")]
    finished: list[int] = []
    bench = Bench(jobs, stubs, finished=lambda: finished.append(1))
    assert not bench.run() and bench.failed == ["broken_seed0"] and finished == [1]
    said = capsys.readouterr().out
    assert "broken_seed0 FAILED in its training (exit code 1)" in said and "error: it is broken" in said
    assert calls(tmp_path) == ["train broken_seed0", "train plain_seed0", "evaluate plain_seed0"]

    (tmp_path / "mended").touch()
    assert Bench(jobs, stubs).run()
    assert calls(tmp_path) == ["train broken_seed0", "evaluate broken_seed0"]  # plain is not done again
    assert Bench(jobs, stubs).run() and calls(tmp_path) == []

    again = [job(tmp_path, "plain", evaluation=["--task", "knn"])]
    assert Bench(again, stubs).run() and calls(tmp_path) == ["evaluate plain_seed0"]


def test_a_signal_stops_the_programs_and_the_same_command_goes_on(tmp_path: Path, stubs: Commands, capsys) -> None:
    jobs = [job(tmp_path, "slow", "ijepa.slow=true"), job(tmp_path, "slower", "ijepa.slow=true"), job(tmp_path, "late")]

    def terminate() -> None:
        while not all((tmp_path / f"{name}_seed0" / "begun").exists() for name in ("slow", "slower")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    bench = Bench(jobs, stubs, at_once=2, every=0.05)
    assert not bench.run() and bench.failed == []
    said = capsys.readouterr().out
    assert "SIGTERM: the programs are asked to stop" in said and "slow_seed0: its training has stopped" in said
    assert sorted(calls(tmp_path)) == ["train slow_seed0", "train slower_seed0"]
    assert (tmp_path / "slow_seed0" / "saved").exists() and (tmp_path / "slower_seed0" / "saved").exists()

    assert Bench(jobs, stubs, at_once=2).run()
    assert sorted(calls(tmp_path)) == [
        *("evaluate late_seed0", "evaluate slow_seed0", "evaluate slower_seed0"),
        *("train late_seed0", "train slow_seed0", "train slower_seed0"),
    ]


def test_progress_tells_step_rate_and_time_left(tmp_path: Path) -> None:
    made = job(tmp_path, "plain")
    made.log.parent.mkdir(parents=True)
    lines = "$ before\nsomething\nstep  50/3510  epoch 0.14  loss 0.3024  240 img/s  wait 0%  left 14m 26s\nsaved it\n"
    made.log.write_text(lines)
    running = Running(made, "training", process=None, log_start=len("$ before\n"))  # type: ignore[arg-type]
    assert running.progress() == "plain_seed0: step 50 of 3510, 240 images/s, 14m 26s left"
    made.log.write_text("$ before\nstep 2/8  knn/label 16.5\n")
    assert running.progress() == "plain_seed0: step 2 of 8"
    running.phase = "evaluation"
    made.log.write_text("$ before\nfeatures of train: 10 of 20\rfeatures of train: 20 of 20")
    assert running.progress() == "plain_seed0: evaluation: features of train: 20 of 20"


def write_grid(folder: Path, **more: Any) -> list[str]:
    """The command line's beginning."""
    grid = {
        "config": "ds_configs/cifar10_tiny.json",
        "recipes": {"plain": [], "quick": ["ijepa.run.stop_after_steps=8"]},
    }
    (folder / "grid.json").write_text(json.dumps({**grid, **more}))
    return [str(folder / "grid.json"), "--folder", str(folder / "runs")]


def test_the_command_line_makes_a_table_of_what_is_finished(tmp_path: Path, stubs: Commands, capsys) -> None:
    arguments = [*write_grid(tmp_path, about="Made up."), "--set", "ijepa.data.train=x.beton"]
    assert recipes.main([*arguments, "--only", "quick"], stubs) == 0
    assert calls(tmp_path / "runs") == ["train quick_seed0", "evaluate quick_seed0"]
    assert recipes.main([*arguments, "--json", str(tmp_path / "out.json"), "--jobs", "2"], stubs) == 0
    assert calls(tmp_path / "runs") == ["train plain_seed0", "evaluate plain_seed0"]
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table.startswith("Made up.") and table in capsys.readouterr().out
    kept = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["recipe"] for row in kept["rows"]["label"]] == ["plain", "quick"]
    assert (
        kept["jobs"][0]["trained"]["seconds"] == 0.5
        and kept["jobs"][0]["commit"] == "abc"
        and kept["set"] == ["ijepa.data.train=x.beton"]
    )

    evaluations = [made.evaluation for made in recipes.jobs_of(recipes.Grid(**GRID), recipes.parse(arguments))]
    assert evaluations == [[], *[["--random-seeds", "1"]] * 3]  # all random encoders are measured once
    with pytest.raises(UserError, match=r"plain_seed0 was trained with other settings(?s:.*)x\.beton"):
        recipes.main([*arguments[:-1], "ijepa.data.train=y.beton"], stubs)


GRID: dict[str, Any] = {"config": "c.json", "recipes": {"a": [], "b": []}, "seeds": [0, 1]}


@pytest.mark.parametrize(
    ("grid", "arguments", "sentence"),
    [
        ({"recipes": {}}, [], r"is not a grid of recipes(?s:.*)recipes"),
        ({"recipes": {"a/b": []}}, [], "letters, digits"),
        ({"recipe": {}}, [], "recipe .*did you mean recipes"),
        ({"recipes": {"plain": ["ijepa.run.sed=1"]}}, [], r"recipe plain: (?s:.*)did you mean seed"),
        (
            {"recipes": {"plain": ["ijepa.masks.sampler=reference", "ijepa.masks.truncation_group=32"]}},
            [],
            "recipe plain: the reference sampler never",
        ),
        ({"evaluate": ["--per-class", "1"]}, [], "--per-class is of --task lowshot"),
        ({}, ["--only", "quik"], "has no such recipe; did you mean quick"),
        ({}, ["--jobs", "0"], "--jobs = 0 must be at least 1"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_starts(tmp_path, stubs, grid, arguments, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        recipes.main([*write_grid(tmp_path, **grid), *arguments], stubs)
    assert calls(tmp_path / "runs") == [] and not (tmp_path / "runs").exists()


def test_the_projects_grids_are_in_order() -> None:
    """Every file's settings are known, and its first recipe is the one that its text compares with."""
    files = sorted((recipes.measure.ROOT / "benchmarks" / "recipes").glob("*.json"))
    assert files
    for file in files:
        arguments = recipes.parse([str(file), "--folder", "unused", "--set", "ijepa.data.train=x.beton"])
        grid = recipes.read_json(recipes.Grid, file, "is not a grid of recipes")
        assert grid.about
        recipes.check(recipes.jobs_of(grid, arguments))
