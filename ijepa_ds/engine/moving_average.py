"""An exponential moving average of sharded fp32 weights, and its cast that a network computes with.

The average is kept in fp32, sharded as ZeRO shards the master weights: each rank averages its slice, casts it to the
working dtype and gathers the others' (an average kept in bf16 barely moves: at momentum 0.996 a step is smaller than
bf16 can resolve).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_ds.engine.shards import MasterShard, Shard, Slices


@dataclass(frozen=True)
class Flat:
    """A parameter group of the average in the working dtype, whole once every process's slice has arrived.

    ``holder``: the rank that averages this process's slice of it, its own or, of another pipeline stage, a peer's.
    """

    shard: Shard
    weights: Tensor  # the whole flat group
    holder: int

    @property
    def slice(self) -> Tensor:
        """The slice that its holder fills: a view."""
        return self.weights[self.shard.first : self.shard.first + self.shard.length]


@dataclass(frozen=True)
class Relay:
    """How processes that train other parts of the network get each other's slices of the average.

    ``group``: one process of each part. ``flats``: of all parts, in the same order in each of these processes.
    """

    group: dist.ProcessGroup
    flats: list[Flat]


class MovingAverage:
    """Starts as a copy of the masters of ``shards``; with a ``relay`` the cast is of the other parts, too."""

    def __init__(self, shards: list[MasterShard], relay: Relay | None = None) -> None:
        self._shards, self._relay = shards, relay
        self._averages = [shard.master.detach().clone() for shard in shards]  # fp32 [length] each
        rank = dist.get_rank() if relay is not None else 0
        self._flats = relay.flats if relay else [Flat(s, torch.empty_like(s.weights), rank) for s in shards]
        self._own = [flat for flat in self._flats if flat.holder == rank]
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
            placement.name: flat.weights[placement.start : placement.stop].view(placement.shape)
            for flat in self._flats
            for placement in flat.shard.placements
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
        for flat, average in zip(self._own, self._averages, strict=True):
            flat.slice.copy_(average)
        if self._relay is not None:  # each slice once over the link between stages, then among those of this stage
            for flat in self._flats:
                dist.broadcast(flat.slice, src=flat.holder, group=self._relay.group)
        works = [flat.shard.gather(flat.weights) for flat in self._flats]
        self._pending = [work for work in works if work is not None]

    def wait(self) -> None:
        """Until the working weights are whole."""
        for work in self._pending:
            work.wait()
        self._pending = []
