"""A copy of a run's state in the host's memory, from which a checkpoint is written while training goes on.

On a GPU the copies run on a stream of their own into pinned memory: neither the host nor the device waits, until the
next update of the weights, which waits for them on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from ijepa_ds.engine.rank_files import Slices
from ijepa_ds.engine.trainable import Outcome, State

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Snapshot:
    """A process's state on the host; nothing may be read before ``wait`` has returned.

    ``last_update``: of the step before, [its loss, the gradient's norm], zeros where it moved nothing.
    """

    tensors: Slices
    adam_steps: dict[str, Tensor]  # by group, a scalar
    last_update: Tensor | None
    shapes: Shapes  # whole, of the parameters that this process knows of
    layout: str
    owned: bool
    wait: Callable[[], object]


class HostCopies:
    """Memory for one snapshot at a time, made at the first and kept: pinning takes longer than copying."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def fit(self, state: State) -> bool:
        """Whether this machine has the memory, should all its processes ask at once."""
        if self._memory or not state.owned:
            return True
        needed = sum(values.nbytes for slices in state.slices.values() for _, values in slices)
        processes = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))  # DeepSpeed's, torchrun's
        return 1.2 * needed * processes < psutil.virtual_memory().available

    def take(self, state: State, outcome: Outcome | None = None) -> Snapshot:
        """Copy ``state``, which may be updated again as soon as this returns.

        The memory is used again by the next call: what was taken before must have been written by then.
        """
        device = next((values.device for slices in state.slices.values() for _, values in slices), torch.device("cpu"))
        if device.type != "cuda":
            return _snapshot(state, outcome, self._copy, lambda: None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            done = torch.cuda.Event()
            copied = _snapshot(state, outcome, self._copy, done.synchronize)
            done.record(self._stream)
        state.hold(done)
        return copied

    def _copy(self, key: tuple[str, int], values: Tensor) -> Tensor:
        held = self._memory.get(key)
        if held is None or held.shape != values.shape:
            held = self._memory[key] = _host_memory(values)
        held.copy_(values.detach(), non_blocking=True)
        return held


def views(state: State, outcome: Outcome | None = None) -> Snapshot:
    """The state itself where it lies on the host, so that it must be written before training goes on."""
    return _snapshot(state, outcome, lambda _, values: values.detach().cpu(), lambda: None)


def _snapshot(
    state: State,
    outcome: Outcome | None,
    copy: Callable[[tuple[str, int], Tensor], Tensor],
    wait: Callable[[], object],
) -> Snapshot:
    tensors: Slices = {kind: {} for kind in state.slices}
    for kind, slices in state.slices.items() if state.owned else ():
        for index, (shard, values) in enumerate(slices):
            host = copy((kind, index), values)
            tensors[kind] |= {piece.name: (piece.start, piece.of(host)) for piece in shard.pieces()}
    counters = enumerate(state.adam_steps.items())
    adam_steps = {group: copy(("adam_steps", index), steps[0]) for index, (group, steps) in counters}
    last_update = None if outcome is None else copy(("last_update", 0), _numbers(outcome))
    return Snapshot(tensors, adam_steps, last_update, state.shapes, state.layout, state.owned, wait)


def _numbers(outcome: Outcome) -> Tensor:
    """fp32 [2], where they were computed: the loss and the gradient's norm, zeros where nothing moved."""
    loss = outcome.losses[-1]
    norm = torch.zeros_like(loss) if outcome.gradient_norm is None else outcome.gradient_norm.float()
    numbers = torch.stack([loss, norm])
    return torch.where(outcome.applied, numbers, torch.zeros_like(numbers))


def _host_memory(like: Tensor) -> Tensor:
    """Pinned, if the copy comes from a GPU and as much may be pinned; else the copy is waited for."""
    pinned = like.device.type == "cuda"
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
    except RuntimeError:
        return torch.empty(like.shape, dtype=like.dtype)
