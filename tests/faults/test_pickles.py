"""Pickles that would do something: in whatever reads files of weights, nothing of them is executed."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ijepa_ds.checks.recorded_run import read_trace
from ijepa_ds.engine.rank_files import open_old_rank_file
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.read import read_reference
from ijepa_ds.exchange.safe_load import read_pickle


class Payload:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def payloads(marker: Path) -> list[Payload]:
    """Ways to make a folder, one by the stand-in of a call within a call."""
    made = f"__import__('os').mkdir({str(marker)!r})"
    return [
        Payload(os.mkdir, str(marker)),
        Payload(os.system, f"mkdir '{marker}'"),
        Payload(eval, made),
        Payload(exec, made),
        Payload(subprocess.check_call, ["mkdir", str(marker)]),
        Payload(getattr, Payload(eval, made), "x"),
        Payload(torch.load, str(marker)),
        Payload(torch.hub.load, str(marker), "x"),
    ]


def save_old(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_bare(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, 2))


def save_array(content: object, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.array([content], dtype=object))


READERS = [read_pickle, read_reference, open_old_rank_file, read_trace]


def test_malicious_pickles(row, tmp_path):
    mine, marker, path = row("malicious pickles"), tmp_path / "executed", tmp_path / "weights.pth.tar"
    for payload in payloads(marker):
        for save in (torch.save, save_old, save_bare, save_array):
            save({"encoder": {"a": torch.ones(2)}, "adam_steps": payload, "master": payload}, path)
            for read in READERS:
                what = f"{payload.call} by {save.__name__} to {read.__name__}"
                try:
                    read(path)
                    outcome = "silent"
                except UserError:
                    outcome = "refused"
                except Exception as error:
                    outcome, what = "traceback", f"{what}: {error!r}"
                if marker.exists():
                    outcome = "silent"
                    marker.rmdir()
                mine.count(outcome, what)
    mine.hold(8 * 4 * len(READERS))
    save_bare(payloads(marker)[0], path)
    pickle.loads(path.read_bytes())
    assert marker.exists()  # this is what they would have done
