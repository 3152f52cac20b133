"""What the benchmarks share."""

from __future__ import annotations

import json

import measure
import pytest
import torch

CPU = torch.device("cpu")


def test_sides_take_turns_and_the_warm_up_is_not_kept() -> None:
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = measure.in_turns(sides, rounds=3, device=CPU, warm_up=2, times=2)
    assert calls == ["a", "a", "b", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_each_rounds_own() -> None:
    assert measure.ratio({"a": [2.0, 10.0, 9.0], "b": [1.0, 10.0, 1.0]}, "a", "b") == 2.0


def test_a_result_says_what_was_compared_on_what(tmp_path) -> None:
    path = tmp_path / "new" / "result.json"
    measure.save(measure.record({"ratio": 1.5}, compared="one\n against the other\n\nmore", device=CPU), path)
    found = json.loads(path.read_text())
    assert found["compared"] == "one against the other" and found["results"] == {"ratio": 1.5}
    assert found["machine"]["versions"]["torch"]
    assert found["machine"]["cores"] >= 1 and found["commit"] and found["command"].startswith("python ")
    assert list(path.parent.iterdir()) == [path]
    measure.save(found, None)  # nothing was asked for


def test_the_command_line_takes_a_device_and_a_file(tmp_path) -> None:
    options = measure.parser("text").parse_args(["--device", "cpu", "--json", str(tmp_path / "x.json")])
    assert options.device == CPU and options.json == tmp_path / "x.json"


def test_a_table_lines_up() -> None:
    text = measure.table([["a", 1.23456], ["long name", 12345.6], ["none", None]], ["what", "value"])
    assert text.splitlines() == [
        "| what      | value  |",
        "|-----------|--------|",
        "| a         | 1.23   |",
        "| long name | 12,346 |",
        "| none      | -      |",
    ]


@pytest.mark.parametrize("times", [1, 4])
def test_seconds_are_those_of_one_call(times: int) -> None:
    calls: list[int] = []
    assert measure.seconds_of(lambda: calls.append(1), CPU, times=times) > 0
    assert len(calls) == times
