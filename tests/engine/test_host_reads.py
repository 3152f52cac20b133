"""A whole pass of the training loop makes the host wait for nothing: counted on a CPU that claims to be async."""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed_runs import FOLDER, once, run_training, tiny_config

from ijepa_ds.checks.host_reads import HostReads

WARM_STEPS = 2  # in the first steps DeepSpeed and torch make their buffers


class _Stream:
    """What DeepSpeed asks of a stream."""

    def wait_stream(self, other: object) -> None:
        """Streams wait on the device."""

    def wait_event(self, event: object) -> None:
        """Likewise."""


def _make_the_cpu_asynchronous() -> None:
    """DeepSpeed then takes the paths of a GPU: streams of its own, buffers in turns, waits."""
    from deepspeed.accelerator import get_accelerator

    accelerator, main = get_accelerator(), _Stream()
    accelerator.is_synchronized_device = lambda: False
    accelerator.resolves_data_dependency = lambda: False
    accelerator.current_stream = lambda *_: main
    accelerator.stream = lambda _: contextlib.nullcontext()
    type(accelerator).Stream = property(lambda _: lambda *_, **__: _Stream())
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


def count_host_reads() -> None:
    """In a rank, before training: everything between two steps of the loader is one pass of the loop."""
    from deepspeed.accelerator import get_accelerator

    from ijepa_ds.data.pretraining_loader import PretrainingLoader

    _make_the_cpu_asynchronous()
    original = PretrainingLoader.from_step
    file = FOLDER / f"host_reads_{id_of_process()}"

    def from_step(self: PretrainingLoader, step: int, end: int, device: object) -> Iterator:
        found: list[list[str]] = []
        for number, batches in enumerate(original(self, step, end, device)):  # type: ignore[arg-type]
            if not WARM_STEPS <= number < end - 1:  # the last one logs
                yield batches
                continue
            with HostReads(get_accelerator()) as reads:
                yield batches
            found.append(reads.found)
        file.write_text(json.dumps(found))

    PretrainingLoader.from_step = from_step  # type: ignore[method-assign]


def count_with_a_planted_read() -> None:
    """The same with one ``.item()`` where the losses are summed."""
    from ijepa_ds.run.losses import LossWindow

    count_host_reads()
    original = LossWindow.add
    LossWindow.add = lambda self, step, outcome: (original(self, step, outcome), outcome.losses[0].item())  # type: ignore


def id_of_process() -> str:
    import os

    return f"{os.environ['MASTER_PORT']}_{os.environ['RANK']}"


@once
def reads_of(world_size: int, accumulation: int, planted: bool = False) -> list[list[str]]:
    """What each counted step of each rank waited for."""
    before = set(FOLDER.glob("host_reads_*"))
    config = tiny_config(
        bf16={"enabled": True},
        zero_optimization={"stage": 2, "overlap_comm": True, "reduce_bucket_size": 20_000},
        train_micro_batch_size_per_gpu=16 // world_size // accumulation,
        ijepa__run__name=f"host_reads_{world_size}_{accumulation}_{planted}",
        ijepa__run__stop_after_steps=7,
        ijepa__monitor__log_steps=1000,
    )
    run = run_training(config, world_size, prepare=count_with_a_planted_read if planted else count_host_reads)
    assert not any(run.exit_codes), run.output
    files: list[Path] = sorted(set(FOLDER.glob("host_reads_*")) - before)
    assert len(files) == world_size
    return [step for file in files for step in json.loads(file.read_text())]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pass_of_the_loop_makes_the_host_wait_for_nothing(world_size: int, accumulation: int) -> None:
    steps = reads_of(world_size, accumulation)
    assert len(steps) == 4 * world_size  # an epoch's end among them: an epoch has four steps
    assert steps == [[]] * len(steps)


def test_a_planted_read_is_found() -> None:
    for step in reads_of(1, 1, True):
        assert len(step) == 1 and step[0].startswith("a value is read at test_host_reads.py:")


def test_each_way_to_wait_is_found_and_none_is_left_watched() -> None:
    accelerator = types.SimpleNamespace(synchronize=lambda: None)
    values, methods = (
        torch.arange(3.0),
        (torch.Tensor.cpu, torch.Tensor.masked_fill_, torch.tensor, torch.cuda.synchronize),
    )
    with HostReads(accelerator) as reads:
        bool(values[0] == 0)
        values.cpu()
        values.numpy()
        values.masked_fill_(values > 1, torch.tensor(0.0))
        torch.tensor(1.0, device="cpu")
        accelerator.synchronize()
        values.masked_fill_(values > 1, 0.0)  # waits for nothing, as these:
        torch.where(values.isfinite(), values, 0.0).sum()
    kinds = [line.split(" at ")[0] for line in reads.found]
    assert kinds == [
        "a value is read",
        "Tensor.cpu()",
        "Tensor.numpy()",
        "masked_fill_ with a tensor",
        "torch.tensor(device=)",
        "synchronize()",
    ]
    assert methods == (torch.Tensor.cpu, torch.Tensor.masked_fill_, torch.tensor, torch.cuda.synchronize)
