"""The processes of a run: who this one is, how they agree, and how they stop together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ijepa_ds.activity import LONG_SECONDS, STEP_SECONDS, doing

Value = TypeVar("Value")


@dataclass(frozen=True)
class Process:
    """This process among all of a run."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # a group of CPU tensors, to agree without waiting for the device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks, writes and draws for all."""
        return self.rank == 0


def share_cpu_threads() -> None:
    """Give torch this process's share of the cores, unless OMP_NUM_THREADS says otherwise.

    Ranks on one machine share its cores (more threads than cores halve the speed), and importing ffcv leaves torch one.
    """
    local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))  # DeepSpeed's, torchrun's
    share = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))


def barrier(process: Process) -> None:
    """Wait for all processes."""
    if process.world_size > 1:
        dist.barrier(group=process.control)


# The heartbeat, which has a sentence for it, speaks before a collective gives up.
_MARGIN = 60.0
STEP_PATIENCE = timedelta(seconds=STEP_SECONDS + _MARGIN)
_LONG_PATIENCE = timedelta(seconds=LONG_SECONDS + _MARGIN)


def set_patience(group: dist.ProcessGroup, patience: timedelta) -> None:
    """How long collectives of a group that begin from now on wait for the slowest process."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # by its older name
    set_timeout(patience, group)


def limit_all_groups() -> None:
    """Give every group there is the patience of a step; DeepSpeed's own have torch's default."""
    for group in list(dist.distributed_c10d._world.pg_map):
        set_patience(group, STEP_PATIENCE)


@contextlib.contextmanager
def patiently(what: str, process: Process) -> Iterator[None]:
    """Around what takes long on one process, while the others wait at the end of it; all processes call this together.

    So no collective of a step, which has less patience, waits for it. ``what``: in words.
    """
    with doing(what, limit=LONG_SECONDS):
        if process.world_size == 1 or process.control is None:
            yield
            return
        set_patience(process.control, _LONG_PATIENCE)
        try:
            yield
            barrier(process)
        finally:
            set_patience(process.control, STEP_PATIENCE)


def from_main(value: Value, process: Process) -> Value:
    """Rank 0's value, on every rank."""
    values = [value]
    if process.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=process.control)
    return values[0]


def gather(value: Any, process: Process) -> list[Any]:
    """Every rank's value, on every rank, in their order."""
    values: list[Any] = [value] * process.world_size
    if process.world_size > 1:
        dist.all_gather_object(values, value, group=process.control)
    return values


def on_any_rank(flags: list[bool], process: Process) -> list[bool]:
    """Of each flag, whether it holds on any rank: decisions that all take alike."""
    if process.world_size == 1:
        return flags
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=process.control)
    return [bool(count) for count in counts]


class Votes:
    """What :func:`on_any_rank` tells, one question late: no rank waits for the slowest one at every step."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.delay = 0 if process.world_size == 1 else 1  # calls between a question and its answer
        self._asked: tuple[np.ndarray, dist.Work | None] | None = None

    def ask(self, flags: list[bool]) -> list[bool]:
        """Of each flag that was given to the call before, whether it held on any rank; false at the first call.

        A lone process hears of its flags at once.
        """
        if self.process.world_size == 1:
            return flags
        before = self._asked
        counts = np.array(flags, np.int32)
        tensor = torch.from_numpy(counts)  # the same memory
        self._asked = counts, dist.all_reduce(tensor, dist.ReduceOp.MAX, self.process.control, async_op=True)
        if before is None:
            return [False] * len(flags)
        counts, work = before
        if work is not None:  # as torch's types have it
            work.wait()
        return counts.astype(bool).tolist()


def mean_over_ranks(value: torch.Tensor, process: Process) -> float:
    """The mean of a scalar over all ranks: waits for the device."""
    mean = value.detach().float().cpu()
    if process.world_size > 1:
        dist.all_reduce(mean, group=process.control)
    return float(mean) / process.world_size


def sum_over_ranks(values: torch.Tensor, process: Process) -> torch.Tensor:
    """The sum over all ranks of a tensor on the device, in place."""
    if process.world_size > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: list[float], process: Process) -> list[float]:
    """The largest of each number over all ranks, NaN where a rank has NaN."""
    return torch.tensor(gather(values, process), dtype=torch.float64).amax(0).tolist()


def average_gradients(parameters: list[torch.nn.Parameter], num_images: int, process: Process) -> int:
    """Turn gradients of a sum over this process's images into those of the mean over all processes' images.

    A process may have none, as where the last images do not go round. Returns the number of all their images.
    """
    total = torch.tensor(num_images)
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if process.world_size > 1:
        dist.all_reduce(total, group=process.control)
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            if work is not None:  # as torch's types have it
                work.wait()
    torch._foreach_div_(gradients, float(max(1, int(total))))
    return int(total)


def gather_rows(rows: torch.Tensor, process: Process) -> torch.Tensor:
    """All ranks' rows [n_r, ...], interleaved as a stride over ranks dealt them out, on the CPU of every rank."""
    if process.world_size == 1:
        return rows
    gathered = gather(rows.cpu().numpy(), process)
    whole = rows.new_empty((sum(map(len, gathered)), *rows.shape[1:]))
    for rank, part in enumerate(gathered):
        whole[rank :: process.world_size] = torch.from_numpy(part)
    return whole
