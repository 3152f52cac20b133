"""The first GPU hour, rehearsed: every section on tiny sizes, and what becomes of one that fails, hangs or dies."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import first_gpu_hour
import pytest
import torch
from distributed_runs import FOLDER, run_ranks, train_beton
from first_gpu_hour import DONE, OUT_OF_TIME, SECTIONS, SKIPPED, Worker
from gpu_findings import Context, Finding, OutOfTime, load_findings

CPU = torch.device("cpu")
# What each section must have found, in the words of its findings.
MUST_HOLD = {
    "device": ["fastest bfloat16", "copy", "moving average"],
    "correctness": [
        "fp32 loss",
        "fp32 gradients",
        "bf16 loss",
        "a NaN step",
        "the step after",
        "losses after a resume",
    ],
    "host_reads": ["accumulation 1", "accumulation 4", "passes of the loop"],
    "vits16": [
        "seconds to build",
        "eager: ms a step",
        "plain: images/s",
        "eager over compiled",
        "DeepSpeed's own checks",
    ],
    "canary": ["'ZeRO 1' against", "'plain torch' against", "bf16, accumulation 4: 'no overlap_comm'"],
    "attention": ["head 80, 256", "head 88", "head 24"],
    "kill": ["kill -9, and the same", "losses before the kill"],
    "loader": ["loader: images", "loader, 1 threads: images/s"],
}


def findings_of(name: str, images: str) -> list[Finding]:
    """In a process of its own: a section as the command would run it."""
    import importlib

    torch.set_num_threads(1)
    section = next(section for section in SECTIONS if section.name == name)
    folder = FOLDER / f"first_gpu_hour_{name}"
    folder.mkdir()
    context = Context(name, CPU, folder, 1800.0, tiny=True, images=Path(images))
    for variable in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_SIZE"):
        os.environ.pop(variable, None)  # a section starts processes that are runs of their own
    function = getattr(importlib.import_module(section.module), section.function)
    function(context, *([section.argument] if section.argument else []))
    return context.findings


# Most of what these do is tested elsewhere, too: peak, average, the host's reads, runs of every stage, kills.
LONG = ("device", "host_reads", "canary", "kill")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in MUST_HOLD])
def test_a_section_finds_what_it_should(name: str) -> None:
    (findings,) = run_ranks(findings_of, 1, name, str(train_beton()))
    for words in MUST_HOLD[name]:
        assert any(words in finding.what for finding in findings), (words, findings)
    wrong = [finding for finding in findings if finding.holds is False]
    assert not wrong, wrong
    assert not [finding for finding in findings if "not made" in str(finding.value)]


def test_every_section_has_a_function_and_is_rehearsed() -> None:
    folder = Path(first_gpu_hour.__file__).parent
    for section in SECTIONS:  # read, not imported: that takes seconds
        assert f"\ndef {section.function}(context: Context" in (folder / f"{section.module}.py").read_text()
    assert {s.function for s in SECTIONS} == {s.function for s in SECTIONS if s.name in MUST_HOLD}
    assert sum(section.seconds for section in SECTIONS[:5]) < 9 * 60  # what matters most has its whole share


def test_the_whole_command(tmp_path, capfd) -> None:
    path = tmp_path / "hour.json"
    first_gpu_hour.main(["--device", "cpu", "--tiny", "--sections", "attention", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["results"]["sections"]["attention"]["status"] == DONE
    assert {finding["section"] for finding in record["results"]["findings"]} == {"attention"}
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("Everything that only a GPU can tell")
    assert lines[-1].endswith("0 not as expected") and any(line.startswith("| attention") for line in lines)


# --------------------------------------------------------------------------------------------------- what may go wrong


def worker(code: str, *, seconds: float = 600.0) -> Worker:
    return Worker("section", seconds, [sys.executable, "-c", f"import sys, time, os\n{code}"], dict(os.environ))


def test_a_process_gets_its_turn_and_its_seconds(tmp_path) -> None:
    process = worker(f"open({str(tmp_path / 'seconds')!r}, 'w').write(sys.stdin.readline())")
    assert process.run(60.0)["status"] == DONE
    assert float((tmp_path / "seconds").read_text()) == 60.0 - first_gpu_hour.GRACE


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.stdin.readline(); sys.exit(3)", "ended with 3"),
        ("sys.stdin.readline(); os.kill(os.getpid(), 11)", "ended with -11"),
        ("raise SystemExit(1)", "ended with 1"),  # before its turn
    ],
)
def test_a_process_that_dies_is_told_from_one_that_is_done(code: str, status: str) -> None:
    assert worker(code).run(600.0)["status"] == status


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(first_gpu_hour, "LEAST", 0.0)
    child = tmp_path / "child"
    program = f"pid = os.fork()\nif pid: open({str(child)!r}, 'w').write(str(pid))\ntime.sleep(1000)"
    process = worker(program, seconds=1.0)
    while not (child.exists() and child.read_text()):
        time.sleep(0.01)
    assert process.run(600.0)["status"] == OUT_OF_TIME
    assert process.process.poll() is not None
    state = Path(f"/proc/{child.read_text()}/stat")
    until = time.monotonic() + 60
    while state.exists() and ") Z" not in state.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    assert not state.exists() or ") Z" in state.read_text()


def test_a_section_for_which_no_time_is_left_is_not_begun() -> None:
    process = worker("sys.stdin.readline(); open('/nowhere/at/all', 'w')")
    assert process.run(first_gpu_hour.LEAST - 1) == {"status": SKIPPED, "seconds": 0.0}
    assert process.process.poll() is not None


def test_what_was_found_is_kept_after_each_section_however_it_ended(tmp_path, monkeypatch, capsys) -> None:
    path, seen = tmp_path / "hour.json", []

    class Scripted:
        def __init__(self, name: str, status: str) -> None:
            self.name, self.status = name, status

        def run(self, left: float) -> dict:
            seen.append(json.loads(path.read_text())["results"] if path.exists() else None)
            Context(self.name, CPU, folder, 10.0).found(f"of {self.name}", 1.5, "> 1", holds=self.name != "canary")
            return {"status": self.status, "seconds": 1.0}

    folder = tmp_path / "work"
    folder.mkdir()
    endings = {"device": DONE, "canary": "ended with -11", "kill": OUT_OF_TIME}
    monkeypatch.setattr(
        first_gpu_hour, "workers_of", lambda *_: (Scripted(name, status) for name, status in endings.items())
    )
    options = first_gpu_hour.parse(["--device", "cpu", "--json", str(path)])
    result = first_gpu_hour.run_all(options, folder)["results"]
    assert [found and list(found["sections"]) for found in seen] == [None, ["device"], ["device", "canary"]]
    rows = [(finding["section"], finding["what"], finding["holds"]) for finding in result["findings"]]
    assert rows == [
        ("device", "of device", True),
        ("canary", "of canary", False),
        ("canary", "the section", False),
        ("kill", "of kill", True),
        ("kill", "the section", None),
    ]
    assert capsys.readouterr().out.rstrip().endswith("2 not as expected")


def test_a_measurement_that_fails_is_a_finding_and_the_next_one_is_made(tmp_path, capsys) -> None:
    context = Context("section", CPU, tmp_path, 100.0)

    def broken() -> None:
        raise ValueError("a reason\nwith a second line")

    def late() -> None:
        raise OutOfTime("3 of 200 steps")

    context.attempt("one", broken)
    context.attempt("two", late)
    context.attempt("three", lambda: context.found("three", 3))
    context.attempt("four", lambda: context.found("four", 4), needs=1000.0)
    found = [(finding.what, finding.value, finding.holds) for finding in load_findings(context.file)]
    assert found[:3] == [
        ("one", "ValueError: a reason with a second line", False),
        ("two", "not made: 3 of 200 steps", None),
        ("three", 3, None),
    ]
    assert found[3][0] == "four" and "1000 s are needed" in found[3][1]
    assert load_findings(tmp_path / "none.json") == []


def test_the_images_are_rendered_once_or_given(tmp_path, monkeypatch) -> None:
    import gpu_findings

    commands: list[list] = []

    def run(command: list) -> None:
        commands.append(command)
        if "to_ffcv" in str(command[1]):
            Path(command[3]).touch()

    monkeypatch.setattr(gpu_findings, "_run", run)
    context = Context("loader", CPU, tmp_path, 100.0, tiny=True)
    assert context.dataset() == context.dataset() == tmp_path / "scenes.beton" and len(commands) == 2
    given = Context("loader", CPU, tmp_path, 100.0, images=tmp_path / "given.beton")
    assert given.dataset() == tmp_path / "given.beton"
