"""Runs side by side: the table, the warnings, the paper's numbers, and files that are no results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ijepa_ds.__main__ import COMMANDS
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.compare import compare, format_comparison, main
from ijepa_ds.evaluation.results import Baseline, Results, TaskResult

BASELINES: dict[str, Baseline] = {"random": {"values": [20.0, 22.0, 24.0]}, "pixels": {"values": [31.5]}}


def task(name: str, label: str, value: float, **changes: Any) -> TaskResult:
    sizes = {"train_images": 1000, "validation_images": 200}
    whole = {"grid": [], "best_head": {}, "baselines": BASELINES, **sizes, **changes}
    return TaskResult(task=name, label=label, value=value, **whole)


def results_of(value: float = 71.2, **changes: Any) -> Results:
    """Results of three tasks."""
    tasks = [task("linear", "label", value), task("count", "count", 40.0), task("transfer", "label", 55.5)]
    config = {"ijepa": {"data": {"train": "a.beton", "validation": "b.beton"}}}
    whole = Results("runs/x", "target", None, {}, config, {"preset": "cifar100"}, tasks)
    return dataclasses.replace(whole, **changes)


def test_one_row_a_task_with_baselines_and_differences() -> None:
    comparison = compare([results_of(), results_of(75.0)], names=["first", "second"])
    assert comparison.warnings == [] and [row.task for row in comparison.rows] == ["linear", "count", "transfer"]
    table = format_comparison(comparison, paper=False)
    lines = table.splitlines()
    assert lines[0] == "A: first" and lines[1] == "B: second" and len(lines) == 6
    assert lines[2].split("  ")[0] == "task" and lines[2].rstrip().endswith("B - A")
    assert lines[3].split() == [
        "linear", "label", "accuracy", "%", "71.20", "22.00", "±", "2.00", "31.50", "+49.20",
        "75.00", "22.00", "±", "2.00", "31.50", "+53.00", "+3.80",
    ]  # fmt: skip
    assert len({len(line) for line in lines[2:]}) == 1, "columns are in line"


def test_the_papers_numbers_stand_beside_their_tasks() -> None:
    comparison = compare([results_of()], names=["x"])
    assert [row.paper.get("H/14") for row in comparison.rows] == [79.3, 86.7, 87.5]
    table = format_comparison(comparison, paper=True)
    header, linear, count, *_ = table.splitlines()
    assert "paper H/14" in header and "A: x" not in table
    assert linear.split()[-4:] == ["72.9", "77.5", "79.3", "81.1"] and count.split()[-4:] == ["-", "-", "86.7", "-"]
    assert "CLEVR" in table and "79.3" not in format_comparison(comparison, paper=False)
    unnamed = results_of(options={})
    assert compare([unnamed], names=["x"]).rows[2].paper == {}


def test_what_was_not_measured_alike_is_warned_of() -> None:
    other = results_of(encoder="context", options={"train": "c.beton"})
    other.tasks[0] = task("linear", "label", 71.2, train_images=500)
    warnings = compare([results_of(), other], names=["x", "y"]).warnings
    assert warnings[0] == "y and x differ in the encoder measured: context and target"
    assert "differ in the data measured: c.beton + b.beton and a.beton + b.beton" in warnings[1]
    assert warnings[2] == "linear label: train images differ (500, 1,000)" and len(warnings) == 3


@pytest.mark.parametrize("config", [{"ijepa": 3}, {"ijepa": {"data": [1]}}, {}])
def test_a_configuration_that_says_nothing_of_data_is_no_traceback(config: dict[str, Any]) -> None:
    comparison = compare([results_of(), results_of(config=config)], names=["a", "b"])
    assert "b and a differ in the data measured: None + None and a.beton + b.beton" in comparison.warnings


def test_tasks_that_one_run_lacks_are_dashes() -> None:
    less, more = results_of(), results_of()
    del less.tasks[0]
    more.tasks.append(task("count", "pieces", 44.0))
    rows = compare([less, more], names=["x", "y"]).rows
    assert [(row.task, row.label) for row in rows] == [
        ("count", "count"), ("transfer", "label (cifar100)"), ("linear", "label"), ("count", "pieces")
    ]  # fmt: skip
    cells = rows[2].cells[1], rows[3].cells[1]
    assert rows[2].cells[0] is None and [cell.value for cell in cells if cell] == [71.2, 44.0]
    assert " -  " in format_comparison(compare([less, more], names=["x", "y"]), paper=True)


@pytest.mark.parametrize(
    "baselines", [{}, {"random": {}}, {"random": {"values": []}}, {"random": {"values": [float("nan")]}}]
)
def test_a_result_without_baselines_is_not_shown(baselines: dict[str, Baseline]) -> None:
    results = results_of()
    results.tasks[1] = task("count", "count", 40.0, baselines=baselines)
    comparison = compare([results], names=["x"])
    assert [row.task for row in comparison.rows] == ["linear", "transfer"]
    assert comparison.warnings == ["x has no random encoders beside count count: left out"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", tmp_path / "other.json"
    results_of().write(run / "evaluation" / "results.json")
    results_of(float("nan")).write(file)
    assert COMMANDS["compare"][0] == "ijepa_ds.evaluation.compare"
    assert main([str(run), str(file), "--paper", "--plot", str(tmp_path / "new" / "bars.png")]) == 0
    printed = capsys.readouterr().out
    assert "nan" in printed and "+49.20" in printed and "paper L/16" in printed and "written:" in printed
    assert (tmp_path / "new" / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(run), str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["names"] == [str(run), str(file)] and printed["rows"][0]["cells"][1]["value"] is None
    cell = {"value": 71.2, "random": 22.0, "random_deviation": 2.0, "pixels": 31.5}
    assert printed["rows"][0]["cells"][0] == cell | {"train_images": 1000, "validation_images": 200}
    assert printed["rows"][0]["paper"]["H/14"] == 79.3


def test_what_leads_to_no_results_or_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is not the results of an evaluation .*python -m ijepa_ds evaluate"):
        main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"holds no results\.json; make one: python -m ijepa_ds evaluate"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match=r"ends in \.png"):
        main([str(tmp_path), "--plot", "bars.pdf"])
    file = tmp_path / "results.json"
    results_of(tasks=[]).write(file)
    with pytest.raises(UserError, match="tasks: List should have at least 1 item"):
        main([str(tmp_path)])
    (tmp_path / "taken").write_text("")
    results_of().write(file)
    with pytest.raises(UserError, match="cannot write"):
        main([str(file), "--plot", str(tmp_path / "taken" / "bars.png")])


def test_errors_are_shown_to_three_digits_and_said_to_be_errors() -> None:
    error = {"metric": "RMSE", "unit": "", "baselines": {"random": {"values": [0.5]}, "pixels": {"values": [2.0]}}}
    runs = [results_of(tasks=[task("dense_knn", "depth", value, **error)]) for value in (0.4321, 0.4)]
    for run, folder in zip(runs, ("one", "other"), strict=True):
        run.options["dense_data"] = folder
    comparison = compare(runs, names=["x", "y"])
    text = format_comparison(comparison, paper=False)
    assert "RMSE" in text and "0.432" in text and "-0.068" in text and "-0.032" in text and "less is better" in text
    assert comparison.warnings == ["the folders of dense data differ: x one, y other"]
    assert "less is better" not in format_comparison(compare([results_of()], names=["x"]), paper=False)
