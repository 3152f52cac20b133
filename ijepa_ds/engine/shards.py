"""The fp32 weights as ZeRO shards them: which elements of which parameter this process holds.

ZeRO lays the parameters of a group end to end in one flat tensor and gives each rank an equal slice of it, so a slice
begins and ends in the middle of parameters. Everything that is kept beside the masters (Adam's moments, the target
encoder's average) has the same shape, and is saved and read by name and interval: any number of processes can read what
any other number wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """A parameter's place in the flat tensor of its group; ``name`` is the same in every engine and layout."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        """Where the next parameter may begin."""
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter, which lie at ``offset`` in a shard."""

    name: str
    start: int
    stop: int
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """The piece of a flat tensor that is laid out as the shard: a view [stop - start]."""
        return values[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True)
class Shard:
    """This process's slice of a parameter group: elements [first, first + length) of the flat group.

    ``process_group``: who holds the other slices; None where nothing is sharded.
    """

    group: str
    placements: tuple[Placement, ...]
    first: int
    length: int
    process_group: dist.ProcessGroup | None

    def pieces(self) -> Iterator[Piece]:
        """What this shard holds of each parameter."""
        last = self.first + self.length
        for placement in self.placements:
            start, stop = max(placement.start, self.first), min(placement.stop, last)
            if start < stop:
                yield Piece(placement.name, start - placement.start, stop - placement.start, start - self.first)

    def publish(self, values: Tensor, weights: Tensor) -> dist.Work | None:
        """Cast ``values`` [length] into this rank's slice of the flat ``weights`` and gather the others' slices.

        Returns what to wait for before ``weights`` may be read, or None.
        """
        weights[self.first : self.first + self.length].copy_(values)
        return self.gather(weights)

    def gather(self, weights: Tensor) -> dist.Work | None:
        """Begin to fill the flat ``weights`` with the others' slices of it; returns what to wait for, or None."""
        if self.process_group is None:
            return None
        own = weights[self.first : self.first + self.length]
        return dist.all_gather_into_tensor(weights, own, group=self.process_group, async_op=True)


@dataclass(frozen=True)
class MasterShard(Shard):
    """A slice of the trained weights.

    ``master``: fp32 [length], a stable tensor. ``weights``: the whole flat group in the working dtype, whose views are
    the model's parameters. ``adam_key``: the tensor under which AdamW keeps its state.
    """

    master: Tensor
    weights: Tensor
    adam_key: Tensor


Slices = list[tuple[Shard, Tensor]]  # fp32 [length] of each shard


def replicated_shards(
    groups: list[list[Tensor]], masters: list[list[Tensor]], param_groups: list[dict], names: dict[int, str]
) -> list[MasterShard]:
    """One shard a parameter, whole on every rank: where nothing is sharded.

    ``groups``: the parameters of each of the optimizer's groups; ``masters``: their fp32 weights, in the same order;
    ``names``: by the parameter's id.
    """
    return [
        MasterShard(
            group=group["name"],
            placements=(Placement(names[id(parameter)], 0, parameter.shape),),
            first=0,
            length=parameter.numel(),
            process_group=None,
            master=master.data.view(-1),
            weights=parameter.data.view(-1),
            adam_key=master,
        )
        for members, copies, group in zip(groups, masters, param_groups, strict=True)
        for parameter, master in zip(members, copies, strict=True)
    ]


def fill(slices: Slices, parameters: dict[str, Tensor]) -> None:
    """Give slices the exact fp32 values of whole parameters, by name."""
    for shard, values in slices:
        for piece in shard.pieces():
            piece.of(values).copy_(parameters[piece.name].reshape(-1)[piece.start : piece.stop])


def publish_masters(shards: list[MasterShard]) -> None:
    """Bring the working weights of every rank up to the masters, after these were filled."""
    for work in [shard.publish(shard.master, shard.weights) for shard in shards]:
        if work is not None:
            work.wait()
