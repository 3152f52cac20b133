"""What the training loop knows of an engine: one optimizer step, the target encoder's features, the state to be saved.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, H x W
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from ijepa_ds.distributed import Process
from ijepa_ds.engine.moving_average import MovingAverage, Relay
from ijepa_ds.engine.shards import MasterShard, Slices, publish_masters
from ijepa_ds.engine.target_encoder import TargetEncoder
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import CONTEXT_ENCODER, IJEPA
from ijepa_ds.method.schedules import Hyperparameters

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
TARGET = "target"  # the kind under which a state holds the target encoder's average


class Batch(Protocol):
    """A micro-batch on the device."""

    images: Tensor  # uint8 [B, H, W, 3], or whatever the engine's ``to_input`` takes
    context_block: Tensor  # int64 [B, K], or [C * B, K] where each image has C contexts
    target_blocks: Tensor  # int64 [M, B, T], or [M, C * B, T] likewise
    keys: Tensor | None  # int64 [B] or [C * B], where the predictor's positions are stochastic


@dataclass(frozen=True)
class Outcome:
    """What an optimizer step did. Everything stays where it was computed until a log line asks."""

    losses: Tensor  # fp32 [k]: of each micro-batch of this process, or a pipeline's mean alone
    applied: Tensor  # false: a gradient was not finite, nothing moved
    gradient_norm: Tensor | None  # over all processes; None where the engine computes none


@dataclass(frozen=True)
class State:
    """This process's slices of all that a run must not lose: views, nothing copied."""

    slices: dict[str, Slices]  # "master", "exp_avg", "exp_avg_sq", "target"
    adam_steps: dict[str, list[Tensor]]  # group -> its counters: one, or one a parameter
    owned: bool  # false where another process holds the same
    layout: str  # how the processes share it, for those who look at a checkpoint: any layout reads any other
    # Lets the next update wait, on the device, for an event: what reads the state there is done by then.
    hold: Callable[[torch.cuda.Event], None] = lambda event: None

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The whole shapes of the trained parameters that this process knows of."""
        return {p.name: list(p.shape) for shard, _ in self.slices["master"] for p in shard.placements}


@dataclass(frozen=True)
class Examination:
    """What one micro-batch does to the weights as they are. Norms are L2, by layer: ``context_encoder.norm``."""

    loss: float | None  # None where it cannot be computed by one process, as ``gradients`` is then empty
    weights: dict[str, float]
    gradients: dict[str, float]


class Trainable(Protocol):
    """Context encoder, predictor and target encoder, however they are split over processes.

    Every method is called by all processes together.
    """

    data_rank: int  # whose share of a batch this process reads
    data_ranks: int
    num_parameters: dict[str, int]  # of the context encoder and of the predictor

    def step(self, batches: Iterator[Batch], now: Hyperparameters) -> Outcome:
        """One optimizer step on this process's micro-batches, all of which are used up."""

    def features(self, images: Tensor) -> Tensor:
        """The target encoder's features of uint8 images [B, H, W, 3], before the target norm: [B, N, D]."""

    def state(self) -> State:
        """What a checkpoint holds of this process; fill its tensors, then :meth:`publish`."""

    def publish(self) -> None:
        """Bring the working weights and the target encoder up to a state that was filled."""

    def examine(self, batch: Batch) -> Examination:
        """What there is to know of a run whose steps are not finite, by a micro-batch of the last one."""

    def describe(self) -> str:
        """How it trains, in a few words."""


class ShardedTrainable:
    """What every engine shares whose fp32 weights are slices: the state, the average and the target encoder.

    Args:
        module: context encoder and predictor, with the weights that compute.
        target: the target encoder's architecture, on the meta device.
        shards: this process's masters, all groups.
        adam: the AdamW that moves them.
        to_input: images of a batch -> the encoders' input [B, 3, H, W].
        relay: for the average, where other stages hold a part of the context encoder.
    """

    layout = "zero"

    def __init__(
        self,
        module: IJEPA,
        target: VisionTransformer,
        shards: list[MasterShard],
        adam: torch.optim.Optimizer,
        process: Process,
        *,
        to_input: Callable[[Tensor], Tensor],
        autocast: torch.dtype | None = None,
        relay: Relay | None = None,
    ) -> None:
        self.module, self.shards, self.adam, self.process = module, shards, adam, process
        self.average = MovingAverage(of_context_encoder(shards), relay)
        self.target_encoder = TargetEncoder(target, self.average, autocast=autocast)
        self.to_input = to_input
        self.batches_at_once = 1  # micro-batches of one pass of the target encoder; their buffers must live on
        self.data_rank, self.data_ranks = process.rank, process.world_size
        self.owned = process.is_main or shards[0].process_group is not None
        self.num_parameters = {name: count_parameters(part) for name, part in module.named_children()}
        self._reader: torch.cuda.Event | None = None  # of the state, see State.hold
        # For checks: called with the whole gradients by name before each step is taken.
        self.watch_gradients: Callable[[dict[str, Tensor]], None] | None = None

    def features(self, images: Tensor) -> Tensor:
        """See :class:`Trainable`."""
        return self.target_encoder.features(self.to_input(images))

    def with_targets(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Each micro-batch with its input [B, 3, H, W] and its targets [M * B, T, D]."""
        while chunk := list(islice(batches, self.batches_at_once)):
            inputs = [self.to_input(batch.images) for batch in chunk]
            if len(chunk) == 1:
                yield chunk[0], inputs[0], self.target_encoder(inputs[0], blocks_by_image(chunk[0]))
                continue
            blocks = torch.cat([blocks_by_image(batch) for batch in chunk], dim=1)  # [M, chunk * B, T]
            targets = self.target_encoder(torch.cat(inputs), blocks)
            by_batch = targets.view(len(blocks), len(chunk), -1, *targets.shape[1:])  # [M, chunk, B, T, D]
            for index, batch in enumerate(chunk):
                yield batch, inputs[index], by_batch[:, index].flatten(0, 1)

    def rehearse(self, batch: Batch) -> None:
        """The forward and backward passes of a micro-batch, of which nothing remains: no gradient is kept or reduced.

        By ``forward`` and not by a call, at which DeepSpeed's hooks would see a step begin.
        """
        self._loss_and_gradients(batch)

    def examine(self, batch: Batch) -> Examination:
        """What a micro-batch does to the weights as they are; nothing moves."""
        loss, gradients = self._loss_and_gradients(batch)
        return Examination(float(loss.detach()), norms_by_layer(self._trained()), norms_by_layer(gradients))

    def _loss_and_gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        _, images, targets = next(self.with_targets(iter([batch] * self.batches_at_once)))
        with self.target_encoder.autocast():
            loss = self.module.forward(images, batch.context_block, batch.target_blocks, targets, batch.keys)
        trained = self._trained()
        return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    def _trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters that this process computes with, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad and not p.is_meta}

    def state(self) -> State:
        """See :class:`Trainable`."""
        adam = [(shard, self._adam_state(shard)) for shard in self.shards]
        slices: dict[str, Slices] = {"master": [(shard, shard.master) for shard in self.shards]}
        for moment in ADAM_MOMENTS:
            slices[moment] = [(shard, state[moment].detach().view(-1)) for shard, state in adam]
        slices[TARGET] = self.average.slices
        adam_steps: dict[str, list[Tensor]] = {}
        for shard, state in adam:
            adam_steps.setdefault(shard.group, []).append(state["step"])
        return State(slices, adam_steps, self.owned, self.layout, self._hold)

    def publish(self) -> None:
        """See :class:`Trainable`."""
        publish_masters(self.shards)
        self.average.publish()

    def wait_for_reader(self) -> None:
        """Before anything of the state is written: let the device wait for who still reads it."""
        if self._reader is not None:
            self._reader.wait()
            self._reader = None

    def _hold(self, event: torch.cuda.Event) -> None:
        self._reader = event

    def _adam_state(self, shard: MasterShard) -> dict[str, Tensor]:
        """AdamW's state of a shard: ``step`` (scalar), moments [length]; made before the first step."""
        state = self.adam.state[shard.adam_key]
        if not state:
            device = shard.master.device if self.adam.defaults.get("fused") else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in ADAM_MOMENTS:
                state[moment] = torch.zeros_like(shard.adam_key)
        return state


def blocks_by_image(batch: Batch) -> Tensor:
    """All target blocks of an image, whichever context they belong to: [M * C, B, T], which one target pass serves."""
    contexts = len(batch.context_block) // len(batch.images)
    return batch.target_blocks.unflatten(1, (contexts, -1)).flatten(0, 1)


def of_context_encoder(shards: list[MasterShard]) -> list[MasterShard]:
    """Those of whose weights the target encoder's are the average."""
    return [shard for shard in shards if shard.group.startswith(CONTEXT_ENCODER)]


def count_parameters(module: nn.Module) -> int:
    """All parameters, fixed positions included."""
    return sum(parameter.numel() for parameter in module.parameters())


def norms_by_layer(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 norms of the tensors of each layer together: a block, or what else a network's ``network.layer.name`` has."""
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        layer = ".".join(parts[: 3 if parts[1].endswith("blocks") else 2])
        squares[layer] = squares.get(layer, 0.0) + float(tensor.detach().float().norm()) ** 2
    return {layer: math.sqrt(square) for layer, square in squares.items()}
