"""Context encoder and predictor as DeepSpeed pipeline stages; the target encoder stays whole beside them.

The target encoder has no backward pass and is half of the arithmetic: in a pipeline it would pay the bubble, and its
tokens would travel from stage to stage. So it runs first, data-parallel over all processes: those of a pipeline each
read a part of every micro-batch, compute its targets and hand these to the last stage, the images to the first. Then
DeepSpeed's schedule of one forward and one backward pass in turns runs over embedding, blocks, norm and predictor, with
one tensor [B, K, D] between two stages.

Shapes: B images of a pipeline's micro-batch, b = B / S of them read by each of its S processes, K context tokens, M
target blocks, T tokens of a target block, D encoder width, H x W pixels.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa_ds.distributed import Process
from ijepa_ds.engine.moving_average import Flat, Relay
from ijepa_ds.engine.shards import MasterShard, Shard, fill
from ijepa_ds.engine.trainable import (
    Batch,
    Examination,
    Outcome,
    ShardedTrainable,
    norms_by_layer,
    of_context_encoder,
)
from ijepa_ds.engine.zero_internals import gradient_slices, initialize, master_shards, without_timers
from ijepa_ds.method.blocks import whole_block
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.optimizer import build_optimizer, gate, set_hyperparameters
from ijepa_ds.method.schedules import Hyperparameters


@dataclass(frozen=True)
class Cut:
    """How a run is cut into stages.

    ``bounds``: of :func:`~ijepa_ds.stage_balance.split_layers` over embedding, blocks, norm and predictor.
    ``same_shapes``: K is the same for all micro-batches; else its size is sent with each.
    """

    bounds: list[int]
    same_shapes: bool = True


@dataclass
class _Part:
    """What one process reads of a micro-batch."""

    images: Tensor  # uint8 [b, H, W, 3]
    context_block: Tensor  # int64 [b, K]
    target_blocks: Tensor  # int64 [M, b, T]
    keys: Tensor | None


class Stages(ShardedTrainable):
    """A :class:`~ijepa_ds.engine.trainable.Trainable` on DeepSpeed's pipeline engine with ZeRO 1.

    Process r of R trains stage r // (R / S) of S, so that the processes of a stage are neighbours on a node. Initial
    weights, names and results are those of :class:`~ijepa_ds.engine.zero.Zero`.

    Args:
        model: context encoder and predictor; its weights become the engine's.
        target: the target encoder's architecture, on the meta device.
        process: of :func:`~ijepa_ds.engine.zero.init_distributed`.
        settings: DeepSpeed's configuration.
        cut: the stages.
        betas: of AdamW, as ``eps``.
        to_input: images of a batch -> the encoders' input [B, 3, H, W] in the working dtype.
        autocast: the dtype of torch_autocast, if it is on.

    Raises:
        UserError: DeepSpeed refuses the settings.
    """

    layout = "stages"

    def __init__(
        self,
        model: IJEPA,
        target: VisionTransformer,
        process: Process,
        *,
        settings: dict[str, Any],
        cut: Cut,
        betas: tuple[float, float],
        eps: float,
        to_input: Callable[[Tensor], Tensor],
        autocast: torch.dtype | None = None,
    ) -> None:
        bounds = cut.bounds
        self.num_stages = len(bounds) - 1
        replicas = process.world_size // self.num_stages
        self.stage, self.replica = divmod(process.rank, replicas)
        self.pipeline = _pipeline_group(self.num_stages, replicas, self.replica)
        self.first = self.replica  # the rank of this pipeline's first stage
        self.last = self.replica + (self.num_stages - 1) * replicas
        layers = _layers(model, lambda images: self.to_input(images))
        own = layers[bounds[self.stage] : bounds[self.stage + 1]]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [(names[id(p)], p) for layer in own for p in layer.parameters() if p.requires_grad]
        exact = {name: parameter.detach().clone() for name, parameter in trained}
        adam = build_optimizer(trained, betas=betas, eps=eps)
        module = _pipeline_module(layers, cut, self._loss)
        _drop_others(layers, own)
        self.engine = initialize(module, adam, _settings(settings))
        without_timers(self.engine)
        shards = master_shards(self.engine, names)
        fill([(shard, shard.master) for shard in shards], exact)
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        super().__init__(
            model,
            target,
            shards,
            inner,
            process,
            to_input=to_input,
            autocast=autocast,
            relay=_relay(of_context_encoder(shards), shards[0], self.pipeline),
        )
        self.owned = True
        self.data_rank = self.replica * self.num_stages + self.stage  # neighbours in a batch: parts of a micro-batch
        self.largest_norm = float(settings.get("gradient_clipping", 0.0))
        self._applied = self._norm = torch.zeros((), device=process.device)
        self._take_step, self.engine.optimizer.step = self.engine.optimizer.step, self._gated_step

    def step(self, batches: Iterator[Batch], now: Hyperparameters) -> Outcome:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        set_hyperparameters(self.adam, now)
        parts = deque(self._hand_over(batch, targets) for batch, _, targets in self.with_targets(batches))
        # DeepSpeed keeps the iterator until the next step: each part leaves it when it is loaded.
        loss = self.engine.train_batch(parts.popleft() for _ in range(len(parts)))
        self.average.update(now.momentum, self._applied)
        return Outcome(loss.detach().float().view(1), self._applied, self._norm)

    def rehearse(self, batch: Batch) -> None:
        """See :class:`~ijepa_ds.engine.trainable.ShardedTrainable`; of as many micro-batches as a stage holds at once.

        ``batch`` is of B images.
        """
        own, blocks = len(batch.images) // self.num_stages, batch.target_blocks
        keys = None if batch.keys is None else batch.keys[:own]
        part = _Part(batch.images[:own], batch.context_block[:own], blocks[:, :own].contiguous(), keys)
        _, _, targets = next(self.with_targets(iter([part] * self.batches_at_once)))
        whole = targets.new_zeros(blocks.shape[0] * blocks.shape[1], *targets.shape[1:])
        micro_batches = self.engine.micro_batches
        handed = {0: batch.images, self.num_stages - 1: whole}.get(self.stage)
        held = handed.new_empty(micro_batches, *handed.shape) if handed is not None else None  # those of a whole step
        losses = []
        for _ in range(min(self.num_stages - self.stage, micro_batches)):
            inputs: Any = batch.images, batch.context_block
            if self.stage > 0:
                width, dtype = self.module.context_encoder.embed_dim, self.target_encoder.dtype
                shape = (*batch.context_block.shape, width)
                inputs = torch.zeros(shape, dtype=dtype, device=self.process.device, requires_grad=True)
            with self.target_encoder.autocast():
                outputs = self.engine.module.forward(inputs)
            if self.stage == self.num_stages - 1:
                more = () if batch.keys is None else (batch.keys,)
                outputs = self._loss(outputs, (batch.context_block, blocks.transpose(0, 1).contiguous(), whole, *more))
            losses.append(outputs.float().sum())
        trained = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        torch.autograd.grad(losses, trained)
        del held

    def examine(self, batch: Batch) -> Examination:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`: of its own layers, and of weights alone."""
        return Examination(None, norms_by_layer(self._trained()), {})

    def describe(self) -> str:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        replicas = self.process.world_size // self.num_stages
        return f"{self.num_stages} pipeline stages x {replicas}, ZeRO 1, {self.target_encoder.dtype}"

    def _hand_over(self, batch: Batch, targets: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Give the first stage the pipeline's images, the last one its targets [M * b, T, D]; what DeepSpeed loads.

        Returns:
            the first stage's input (images [B, ...], context_block [B, K]) and the last stage's labels (context_block,
            target_blocks [B, M, T], targets [M * B, T, D], keys [B] where there are any); each is whole where it is
            needed.
        """
        num_targets, _, count = batch.target_blocks.shape
        keys = [] if batch.keys is None else [batch.keys[:, None]]
        masks = torch.cat([batch.context_block, batch.target_blocks.transpose(0, 1).flatten(1), *keys], dim=1)
        all_masks = masks.new_empty(self.num_stages * len(masks), masks.shape[1])
        dist.all_gather_into_tensor(all_masks, masks, group=self.pipeline)
        context, blocks, *rest = all_masks.split(
            [batch.context_block.shape[1], num_targets * count, *(1 for _ in keys)], dim=1
        )
        images = self._gather(batch.images, self.first)
        by_image = targets.unflatten(0, (num_targets, -1)).transpose(0, 1)  # [b, M, T, D]
        whole = self._gather(by_image, self.last).transpose(0, 1).flatten(0, 1)
        labels = context, blocks.unflatten(1, (num_targets, count)), whole, *(part.flatten() for part in rest)
        return (images, context), labels

    def _gather(self, part: Tensor, where: int) -> Tensor:
        """The parts [b, ...] of all processes of this pipeline on rank ``where``: [B, ...]; elsewhere the own part."""
        part = part.contiguous()
        if self.process.rank != where:
            dist.gather(part, None, dst=where, group=self.pipeline)
            return part
        whole = part.new_empty(self.num_stages * len(part), *part.shape[1:])
        dist.gather(part, list(whole.chunk(self.num_stages)), dst=where, group=self.pipeline)
        return whole

    def _loss(self, context: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """The last stage's: context [B, K, D] and what :meth:`_hand_over` made -> scalar."""
        context_block, blocks, targets, *keys = labels
        with self.target_encoder.autocast():
            return self.module.loss(context, context_block, blocks.transpose(0, 1).contiguous(), targets, *keys)

    def _gated_step(self, *arguments: Any, **keywords: Any) -> None:
        """In place of the optimizer's step: a gradient that is not finite on one stage skips it on all."""
        self.wait_for_reader()
        gradients = gradient_slices(self.engine)
        if gradients is None:  # DeepSpeed looks itself, over all stages
            self._take_step(*arguments, **keywords)
            device = self.process.device
            self._applied = torch.tensor(not self.engine.optimizer.overflow, device=device)
            self._norm = torch.as_tensor(self.engine.optimizer._global_grad_norm, device=device)
            return
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        dist.all_reduce(square)  # no two processes hold the same slice
        self._norm = square.sqrt()
        self._applied = gate(self.adam, self._norm, self.largest_norm)
        self._take_step(*arguments, **keywords)


# ------------------------------------------------------------------------------------------------------------- layers
# The functions that a layer calls are attributes of networks which it must not register as its own.


class _Embed(nn.Module):
    """(images, context_block [B, K]) -> tokens [B, K, D]."""

    def __init__(self, encoder: VisionTransformer, to_input: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = encoder.patch_embed, encoder.pos_embed
        self.embed, self.to_input = encoder.embed, to_input

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        images, context_block = inputs
        return self.embed(self.to_input(images), context_block)


class _Block(nn.Module):
    """[B, K, D] -> [B, K, D], compiled or checkpointed as the encoder has it."""

    def __init__(self, encoder: VisionTransformer, block: nn.Module) -> None:
        super().__init__()
        self.block, self.run = block, encoder.run_block

    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(whole_block, self.block, tokens)


class _Predictor(nn.Module):
    """Tokens as they come: what the predictor needs beside them are the labels, which the loss gets."""

    def __init__(self, model: IJEPA) -> None:
        super().__init__()
        self.predictor, self.regulariser = model.predictor, model.regulariser

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


def _layers(model: IJEPA, to_input: Callable[[Tensor], Tensor]) -> list[nn.Module]:
    """What is cut into stages."""
    encoder = model.context_encoder
    blocks = [_Block(encoder, block) for block in encoder.blocks]
    return [_Embed(encoder, to_input), *blocks, encoder.norm, _Predictor(model)]


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


def _pipeline_module(layers: list[nn.Module], cut: Cut, loss: Callable) -> nn.Module:
    """DeepSpeed's module of this process's layers, on its device."""
    from deepspeed.pipe import PipelineModule

    class Layers(PipelineModule):
        def _partition_layers(self, method: str = "") -> None:
            self.parts = cut.bounds
            self._set_bounds(*cut.bounds[self.stage_id : self.stage_id + 2])

    with contextlib.redirect_stdout(io.StringIO()):  # what it decides, which describe() says shorter
        return Layers(layers, num_stages=len(cut.bounds) - 1, loss_fn=loss, dynamic_shape=not cut.same_shapes)


def _drop_others(layers: list[nn.Module], own: list[nn.Module]) -> None:
    """Free the memory of layers that other processes train."""
    for layer in layers:
        if not any(layer is kept for kept in own):
            layer.to("meta")


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings with what a pipeline needs."""
    ours = copy.deepcopy(settings)
    if ours.get("communication_data_type") is None:
        ours["communication_data_type"] = "fp32"  # else sums of fp32 gradients travel in bf16
    ours["zero_optimization"]["overlap_comm"] = False  # in a pipeline it would reduce nothing
    if ours.get("bf16", {}).get("enabled"):
        ours["bf16"].setdefault("immediate_grad_update", True)  # a hook a tensor, not a loop over all
    return ours


# -------------------------------------------------------------------------------------------------- processes, average


def _pipeline_group(stages: int, replicas: int, own: int) -> dist.ProcessGroup:
    """The processes of this process's pipeline, as a communicator with an order of its own, apart from DeepSpeed's."""
    groups = [dist.new_group([replica + stage * replicas for stage in range(stages)]) for replica in range(replicas)]
    group = groups[own]
    assert isinstance(group, dist.ProcessGroup)
    return group


def _relay(own: list[MasterShard], like: MasterShard, pipeline: dist.ProcessGroup) -> Relay:
    """The average's slices on all stages of this pipeline. ``like``: any shard of this process."""
    told = [(s.group, s.placements, s.first, s.length, s.weights.numel()) for s in own]
    by_stage: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(by_stage, told, group=pipeline)
    flats = []
    for holder, shards in zip(dist.get_process_group_ranks(pipeline), by_stage, strict=True):
        for group, placements, first, length, size in shards:
            # Its other slices are with the processes beside the holder, and relayed to those beside this one.
            shard = Shard(group, placements, first, length, like.process_group)
            flats.append(Flat(shard, like.weights.new_empty(size), holder))
    return Relay(pipeline, flats)
