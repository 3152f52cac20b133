"""An exponential moving average of sharded fp32 weights, and its cast that a network computes with.

The average is kept in fp32, sharded as ZeRO shards the master weights: each rank averages its slice, casts it to the
working dtype and gathers the others' (an average kept in bf16 barely moves: at momentum 0.996 a step is smaller than
bf16 can resolve).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_ds.engine.shards import MasterShard, Slices


class MovingAverage:
    """Starts as a copy of the masters of ``shards``."""

    def __init__(self, shards: list[MasterShard]) -> None:
        self._shards = shards
        self._averages = [shard.master.detach().clone() for shard in shards]  # fp32 [length] each
        self._weights = [torch.empty_like(shard.weights) for shard in shards]  # the whole flat groups, working dtype
        self._pending: list[dist.Work] = []
        self.publish()

    @property
    def slices(self) -> Slices:
        """This rank's part of the average, fp32: views, to be saved or filled."""
        return list(zip(self._shards, self._averages, strict=True))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The whole average by parameter name in the working dtype: views that :meth:`publish` keeps up to date."""
        return {
            placement.name: weights[placement.start : placement.stop].view(placement.shape)
            for shard, weights in zip(self._shards, self._weights, strict=True)
            for placement in shard.placements
        }

    @torch.no_grad()
    def update(self, momentum: float, applied: Tensor) -> None:
        """average <- momentum * average + (1 - momentum) * master, in fp32 on this rank's slices, then published.

        Nothing moves where ``applied`` is false: a scalar on the device, which is not read.
        """
        weight = applied.float() * (1.0 - momentum)
        for shard, average in zip(self._shards, self._averages, strict=True):
            average.lerp_(shard.master, weight)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the working weights of every rank up to the averages; :meth:`wait` before they are read."""
        self.wait()
        works = [s.publish(a, w) for s, a, w in zip(self._shards, self._averages, self._weights, strict=True)]
        self._pending = [work for work in works if work is not None]

    def wait(self) -> None:
        """Until the working weights are whole."""
        for work in self._pending:
            work.wait()
        self._pending = []
