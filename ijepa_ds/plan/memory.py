"""Memory of a GPU in a run: the largest sum that is alive at once, by what it is for. Bytes; E, W are parameters.

What DeepSpeed's optimizers keep was read in its sources (the version that setup.py pins) and in ``ijepa_ds/engine``:

* ZeRO 2 (and 1 in fp32): masters and moments in fp32, sharded; gradients in the precision of their sums, sharded under
  ZeRO 2; one bucket, two with ``overlap_comm``, and the copy of one that travels.
* ZeRO 1 in bf16 with fp32 sums, and pipeline stages: whole fp32 gradients, copied to be reduced.
* ZeRO 0: nothing is sharded.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from ijepa_ds.plan.activations import Layer
from ijepa_ds.plan.workload import Workload
from ijepa_ds.stage_balance import split_layers

OUTSIDE = 1.5e9  # CUDA's context, libraries' workspaces, communicators: assumed
HEADROOM = 0.95  # of a GPU's memory that is taken to be of use, for what is lost between buffers
BATCHES_AHEAD = 4  # uint8 images of this and the next micro-batches
_EXACT = 4
_LARGEST_COPY = 500_000_000  # elements, of the gradients that DeepSpeed's engine reduces without buckets


@dataclass(frozen=True)
class Memory:
    """Of the fullest GPU, in bytes. ``working``: whatever lives for a moment in the backward or the target's pass."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    target: float
    buckets: float
    activations: float
    working: float
    images: float
    outside: float = OUTSIDE

    @property
    def total(self) -> float:
        """At the worst moment of a step."""
        return sum(self.parts().values())

    @property
    def state(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.average + self.target

    def parts(self) -> dict[str, float]:
        """By name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Stage:
    """A stage's share of the trained networks."""

    index: int
    parameters: int
    of_encoder: int
    layers: list[Layer]
    is_last: bool


def memory_of(work: Workload, gpus: int, *, micro_batch: int | None = None, checkpointed: bool | None = None) -> Memory:
    """Of the fullest of ``gpus`` GPUs; with another micro-batch or with the other kind of activations where given."""
    stages = memory_of_stages(work, gpus, micro_batch=micro_batch, checkpointed=checkpointed)
    return max(stages, key=lambda memory: memory.total)


def memory_of_stages(
    work: Workload, gpus: int, *, micro_batch: int | None = None, checkpointed: bool | None = None
) -> list[Memory]:
    """The same of a GPU of each stage, the first one's first."""
    ways = work.checkpointed if checkpointed is None else checkpointed
    return [_of_stage(work, stage, gpus, micro_batch or work.micro_batch) for stage in _stages(work, ways)]


def _stages(work: Workload, checkpointed: bool) -> list[_Stage]:
    kept, parameters = work.activations(checkpointed=checkpointed), work.layer_parameters
    bounds = split_layers(work.layer_costs, work.stages)
    return [
        _Stage(
            index,
            sum(parameters[start:stop]),
            sum(parameters[start : min(stop, len(parameters) - 1)]),
            kept[start:stop],
            stop == len(parameters),
        )
        for index, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _of_stage(work: Workload, stage: _Stage, gpus: int, micro_batch: int) -> Memory:
    replicas = gpus // work.stages
    shards = replicas if work.zero_stage else 1
    size = work.weight_bytes
    masters = 2 if not work.zero_stage and not work.is_bf16 else 3  # fp32 weights that nothing shards are the masters
    in_flight = min(work.stages - stage.index, max(1, work.global_batch // (micro_batch * replicas)))
    activations = _activations(work, stage, micro_batch, in_flight)
    working, target_pass = _working(work, stage, micro_batch)
    return Memory(
        weights=size * stage.parameters,
        gradients=_gradients(work, stage.parameters, shards),
        optimizer=masters * _EXACT * stage.parameters / shards,
        average=_EXACT * stage.of_encoder / shards,
        target=size * work.encoder_parameters,
        buckets=_buckets(work, stage.parameters),
        activations=activations,
        working=max(working, target_pass - activations),  # the target's pass is over when activations begin
        images=_images(work, stage, micro_batch, replicas),
    )


def _gradients(work: Workload, parameters: int, shards: int) -> float:
    sums = work.sums_bytes
    if work.zero_stage == 2:
        return sums * parameters / shards  # whole ones never are: each goes into a bucket when it is made
    if not work.has_separate_sums:
        return work.weight_bytes * parameters
    immediate = work.stages > 1 or work.settings["bf16"].get("immediate_grad_update")
    return (sums + (0 if immediate else work.weight_bytes)) * parameters


def _buckets(work: Workload, parameters: int) -> float:
    zero = work.settings["zero_optimization"]
    if not work.zero_stage or (work.zero_stage == 1 and work.has_separate_sums):
        return min(_LARGEST_COPY, parameters) * (work.sums_bytes if work.zero_stage else work.weight_bytes)
    size = int(zero["reduce_bucket_size"])
    buffers = (2 if zero.get("overlap_comm") else 1) * size * work.weight_bytes
    return buffers + min(size, parameters) * work.reduced_bytes


def _activations(work: Workload, stage: _Stage, micro_batch: int, in_flight: int) -> float:
    kept = in_flight * sum(layer.kept for layer in stage.layers) + max(layer.recomputed for layer in stage.layers)
    between = 0.0
    if work.stages > 1:  # DeepSpeed keeps a stage's input and its result until their backward pass
        between = 2 * in_flight * work.tokens.most_context * work.shapes.encoder.width * work.kept.residual
    cast = work.kept.residual > work.kept.product  # autocast's copies of the weights
    return micro_batch * work.tokens.contexts * (kept + between) + (work.kept.product * stage.parameters if cast else 0)


def _working(work: Workload, stage: _Stage, micro_batch: int) -> tuple[float, float]:
    """Bytes that a backward pass holds beside what was kept, and those of the target encoder's pass."""
    encoder, predictor, tokens = work.shapes.encoder, work.shapes.predictor, work.tokens
    sequence = tokens.num_targets * (tokens.most_context + tokens.most_target)
    gradients = [tokens.most_context * (2 * encoder.hidden + 3 * encoder.width)]
    if stage.is_last:
        gradients.append(sequence * (2 * predictor.hidden + 3 * predictor.width))
    predictions = tokens.num_targets * tokens.most_target * encoder.width if stage.is_last else 0
    loss = predictions * (2 * work.kept.product + _EXACT)  # predictions, and gradients in both precisions
    backward = micro_batch * tokens.contexts * max(loss, work.kept.product * max(gradients))
    block = max(3 * encoder.width + 2 * encoder.hidden, 6 * encoder.width)
    own = micro_batch // work.stages
    normalised = 3 * work.pixels * 2 * _EXACT
    return backward, own * max(work.kept.product * work.shapes.num_patches * block, normalised)


def _images(work: Workload, stage: _Stage, micro_batch: int, replicas: int) -> float:
    """Bytes of images, uint8 and as they are computed with; between stages those of a whole step, and its targets."""
    own = micro_batch // work.stages
    held = own * 3 * work.pixels * (BATCHES_AHEAD + work.weight_bytes)
    if work.stages == 1:
        return held
    of_step = work.global_batch // replicas
    handed = of_step * 3 * work.pixels / (1 if stage.index == 0 else work.stages)
    targets = of_step * work.tokens.num_targets * work.tokens.most_target * work.shapes.encoder.width * _EXACT
    return held + handed + targets / (1 if stage.is_last else work.stages)
