"""Hostile records of a run: config.json, metrics.jsonl, state.json and lock, as somebody else may have left them."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import tiny_config
from test_configs import changed, garbled, time_limit

from ijepa_ds.build import build_ijepa, build_target
from ijepa_ds.config import Config, parse_config
from ijepa_ds.engine.checkpoint_files import read_weights
from ijepa_ds.engine.checkpoint_writer import save
from ijepa_ds.engine.plain import Plain
from ijepa_ds.errors import UserError
from ijepa_ds.run.checkpoints_command import look
from ijepa_ds.run.folder import RunFolder, find_checkpoint, read_run_record
from ijepa_ds.run.lock import LOCK, hold, release
from ijepa_ds.run.metrics_file import MetricsFile

IMAGES, STEP = 16, 7
ROWS = [{"step": step, "time": 1.5 * step, "loss": 1 / step, "epoch": None} for step in range(1, 11)]
TEXTS = [b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe{}", b"\0" * 100, b"[" * 1000 + b"]" * 1000]
TEXTS += [b'{"a":' * 1000 + b"1" + b"}" * 1000, b'{"step": ' + b"9" * 4301 + b"}", b'{"step": NaN}', b'{"step": 1e999}']
TEXTS += [b'{"step": 1, "step": 2}', b'{"config": {}, "images": -1}', b'{"config": null, "images": true}', b"{" * 10**6]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[RunFolder, Config, dict[str, torch.Tensor]]:
    """A whole run folder, its configuration and its weights."""
    model = {"width": 16, "depth": 1, "heads": 2, "predictor_width": 16, "predictor_depth": 1}
    place = {"ijepa__run__folder": str(tmp_path_factory.mktemp("records"))}
    config = parse_config(tiny_config(**place, **{f"ijepa__model__{key}": value for key, value in model.items()}))
    folder = RunFolder(config)
    folder.prepare(config, IMAGES)
    trainable = Plain(build_ijepa(config), build_target(config), betas=(0.9, 0.99), eps=1e-8, to_input=lambda x: x)
    checkpoint = save(folder.checkpoints, STEP, trainable.state(), trainable.process, keep=1)
    (folder.path / "metrics.jsonl").write_bytes(b"".join(map(line_of, ROWS)))
    return folder, config, read_weights(checkpoint, "target")


def line_of(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


# ------------------------------------------------------------------------------------------------- what becomes of them


def mutated(path: Path, draw: random.Random, turn: int) -> None:
    """Make a record another: as no program writes it, replaced as a whole, or with other values."""
    whole = path.read_bytes()
    kinds: list[Callable[[], object]] = [
        lambda: path.write_bytes(garbled(whole.decode(), draw)),
        lambda: path.write_bytes(draw.choice(TEXTS)),
        lambda: path.write_text(json.dumps(changed(json.loads(whole), draw))),
        lambda: path.write_text(json.dumps(changed(json.loads(whole), draw))),
        lambda: no_file(path, draw),
    ]
    kinds[turn % len(kinds)]()


def no_file(path: Path, draw: random.Random) -> None:
    path.unlink()
    if (kind := draw.randrange(4)) == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")  # it has no end


def config_is_read(folder: RunFolder, config: Config, weights: dict[str, torch.Tensor]) -> None:
    """As a resume, `evaluate` and `export` read config.json."""
    folder.check_belongs(config, IMAGES)
    saved, images = read_run_record(find_checkpoint(folder.path)[0])
    assert saved.recipe() == config.recipe() and images in (IMAGES, None), "another run's record was taken"


def state_is_read(folder: RunFolder, config: Config, weights: dict[str, torch.Tensor]) -> None:
    """As everything reads state.json: what is taken is what was saved."""
    rows, _ = look(folder.path, verify=True)
    _, checkpoint = find_checkpoint(folder.path)
    found = read_weights(checkpoint, "target")
    assert rows[0].problem is None
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def metrics_are_read(folder: RunFolder, config: Config, weights: dict[str, torch.Tensor]) -> None:
    """As a resume reads metrics.jsonl: whole lines up to its step stay, and it can be written on."""
    path = folder.path / "metrics.jsonl"
    whole = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    try:
        file = MetricsFile(path, last_step=STEP)
    except OSError as error:  # the monitor makes a sentence of it
        raise UserError(str(error)) from error
    file.write(STEP + 1, {"loss": 0.5})
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines][-1] == STEP + 1
    known = [line_of(values) for values in ROWS[:STEP]]
    assert [line for line in lines if line in known] == [line for line in whole.splitlines(True) if line in known]
    assert all(json.loads(line)["step"] <= STEP for line in lines[:-1])


def lock_is_taken(folder: RunFolder, config: Config, weights: dict[str, torch.Tensor]) -> None:
    """As a run begins."""
    hold(folder.path)
    said = json.loads((folder.path / LOCK).read_text())
    release(folder.path)
    assert said.keys() == {"host", "pid", "since"}


RECORDS = {
    "config.json": config_is_read,
    "metrics.jsonl": metrics_are_read,
    f"checkpoints/step_{STEP:09d}/state.json": state_is_read,
    LOCK: lock_is_taken,
}


def attack(row, run: tuple[RunFolder, Config, dict[str, torch.Tensor]], folder: Path, count: int) -> None:
    """Mutate each record ``count`` times, in a copy, and read it as the product does."""
    source, config, weights = run
    draw = random.Random(count)
    for name, read in RECORDS.items():
        for turn in range(count):
            copied = copy.copy(source)
            copied.path = folder / config.ijepa.run.name
            copied.checkpoints = copied.path / "checkpoints"
            shutil.rmtree(copied.path, ignore_errors=True)
            shutil.copytree(source.path, copied.path)
            path = copied.path / name
            if name == LOCK:
                path.write_text('{"host": "x", "pid": 1, "since": "y"}')
            if name == "metrics.jsonl":
                mutate_lines(path, draw, turn)
            else:
                mutated(path, draw, turn)
            what = f"{name}, turn {turn} of {count}: {path.read_bytes()[:300] if is_small(path) else 'no file'}"
            row.count(*judged(lambda read=read, copied=copied: read(copied, config, weights), what))


def is_small(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def mutate_lines(path: Path, draw: random.Random, turn: int) -> None:
    if turn % 5 == 4:
        return no_file(path, draw)
    lines = [*map(line_of, ROWS)]
    for _ in range(draw.randrange(1, 4)):
        kind, place = draw.randrange(5), draw.randrange(len(lines))
        row = json.loads(line_of(draw.choice(ROWS)))
        lines[place] = [
            garbled(lines[place].decode(errors="replace") + "0", draw),
            draw.choice(TEXTS) + b"\n",
            line_of(changed(row, draw)),
            lines[place][: draw.randrange(len(lines[place]) + 1)],
            line_of({**row, "step": draw.choice([True, None, "3", 3.0, -1, 10**30, [3]])}),
        ][kind]
    path.write_bytes(b"".join(lines))


def judged(read: Callable[[], None], what: str) -> tuple[str, str]:
    """The outcome, and for a bad one how it came about."""
    try:
        with time_limit(), contextlib.redirect_stdout(None):
            read()
    except UserError as error:
        plain = "Traceback" not in str(error) and len(str(error)) < 20_000 and str(error)
        return ("refused" if plain else "traceback"), f"{what}: {error}"
    except TimeoutError:
        return "hung", what
    except AssertionError:
        return "silent", f"{what}: {traceback.format_exc()[-500:]}"
    except Exception:
        return "traceback", f"{what}: {traceback.format_exc()[-700:]}"
    return "survived", ""


def test_hostile_records_of_a_run(row, run, tmp_path):
    mine = row("hostile records of a run, short")
    attack(mine, run, tmp_path, 25)
    mine.hold(100)
    assert min(mine.counts["refused"], mine.counts["survived"]) > 20


@pytest.mark.long
def test_two_thousand_hostile_records_of_a_run(row, run, tmp_path):
    mine = row("hostile records of a run")
    attack(mine, run, tmp_path, 500)
    mine.hold(2000)
