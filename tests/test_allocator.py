"""Freed memory is handed out again without page faults, unless the environment has it otherwise."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from distributed_runs import run_ranks

from ijepa_ds import allocator

MEGABYTES, ROUNDS = 24, 20


def faults(keep: bool) -> int:
    """Page faults of a step that writes eight tensors of 24 MB and frees them, after the first such steps."""
    if keep:
        allocator.keep_freed_memory()
    before = 0
    for turn in range(ROUNDS + 3):
        if turn == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.empty(MEGABYTES * 2**18).fill_(1.0) for _ in range(8)]
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // ROUNDS


def test_a_step_on_a_cpu_faults_in_no_page_that_it_had_before():
    pages = 8 * MEGABYTES * 2**20 // os.sysconf("SC_PAGE_SIZE")
    (returned,), (kept,) = run_ranks(faults, 1, False), run_ranks(faults, 1, True)
    if returned < pages // 4:
        pytest.skip("this system's allocator, or its huge pages, cause few faults")
    assert kept < pages // 100


@pytest.mark.parametrize(("environment", "calls"), [({}, 1), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, 0)])
def test_a_threshold_of_the_environment_is_left_alone(monkeypatch, environment, calls):
    made = []
    monkeypatch.setattr(allocator, "set_thresholds", lambda **thresholds: made.append(thresholds))
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    allocator.keep_freed_memory()
    assert len(made) == calls
