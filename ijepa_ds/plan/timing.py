"""Time of an optimizer step: products at a share of the device's peak, and what travels between GPUs beside them.

Bytes are of a GPU. A ring of R ranks moves (R - 1) / R of what it gathers over each link, and twice that of what it
sums. What runs at the same time as enough arithmetic takes no time of its own: reductions beside the backward pass, but
for the last bucket; the gather of new weights beside the target encoder's pass.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ijepa_ds.plan.gpus import Cluster
from ijepa_ds.plan.workload import Workload
from ijepa_ds.stage_balance import bubble, split_layers

LINK_EFFICIENCY = 0.8  # of a link's data sheet, that transfers reach: assumed
MEMORY_EFFICIENCY = 0.8  # the same of a GPU's memory
_BACKWARD = 2 / 3  # of the arithmetic of what is trained
# Bytes that AdamW, the norm and the cast move for each weight of a shard: four values read and three written, one more
# read, two bytes written; and those of the average: two read, one and its cast written.
_BYTES_OF_ADAM, _BYTES_OF_AVERAGE = 34, 14


@dataclass(frozen=True)
class Traffic:
    """Bytes of one optimizer step that a GPU has a part in, before they are multiplied by a ring's (R - 1) / R."""

    reduced: float
    gathered_weights: float
    gathered_average: float
    between_stages: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; ``*_hidden`` run beside arithmetic and are not in the total."""

    target: float
    context_encoder: float
    predictor: float
    recomputed: float
    bubble: float
    update: float
    reduce_exposed: float
    reduce_hidden: float
    weights_exposed: float
    weights_hidden: float
    average_exposed: float
    stages_exposed: float

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return sum(value for name, value in vars(self).items() if not name.endswith("_hidden"))

    @property
    def arithmetic(self) -> float:
        """Seconds of the products that the method needs."""
        return self.target + self.context_encoder + self.predictor


def accumulation(work: Workload, gpus: int) -> int:
    """Micro-batches of a step, of each replica."""
    return work.global_batch * work.stages // (work.micro_batch * gpus)


def traffic_of(work: Workload, gpus: int) -> Traffic:
    """Of the run on so many GPUs; with stages a GPU's share is the mean stage's."""
    replicas = gpus // work.stages
    size, stages = work.weight_bytes, work.stages
    average = size * work.encoder_parameters if gpus > 1 and (stages > 1 or work.zero_stage) else 0
    if replicas == 1:
        return Traffic(0.0, 0.0, average, _between_stages(work, gpus))
    every_micro_batch = accumulation(work, gpus) if work.zero_stage == 2 else 1
    weights = work.parameters / stages
    gathered = size * weights if work.zero_stage else 0.0
    return Traffic(work.reduced_bytes * weights * every_micro_batch, gathered, average, _between_stages(work, gpus))


def _between_stages(work: Workload, gpus: int) -> float:
    """Tokens forward and their gradients back, received by a GPU that is neither first nor last."""
    if work.stages == 1:
        return 0.0
    images = work.micro_batch * accumulation(work, gpus)
    return 2.0 * images * work.tokens.context * work.shapes.encoder.width * work.kept.residual


def step_time(work: Workload, cluster: Cluster, efficiency: float) -> StepTime:
    """Predicted seconds; ``efficiency`` is the share of the peak that the products reach."""
    peak = 1e12 * (cluster.gpu.bf16 if work.dtype == torch.bfloat16 else cluster.gpu.fp32)
    images = work.global_batch / cluster.gpus
    second = images / (peak * efficiency)
    flops, gpus = work.flops, cluster.gpus
    target, encoder, predictor = (second * part for part in (flops.target, flops.context_encoder, flops.predictor))
    recomputed = (encoder + predictor) / 3 if work.checkpointed else 0.0
    trained = encoder + predictor + recomputed
    traffic, replicas = traffic_of(work, gpus), gpus // work.stages
    ring = (replicas - 1) / replicas / (1e9 * LINK_EFFICIENCY * cluster.bandwidth(replicas))
    reduce, weights = 2 * traffic.reduced * ring, traffic.gathered_weights * ring
    waits = max(0.0, _share_of_dearest(work) * work.stages / (1 - bubble(work.stages, accumulation(work, gpus))) - 1)
    hidden = _hidden_reduction(work, reduce, trained * _BACKWARD)
    # Beside the target encoder's pass over the first micro-batch; DeepSpeed's own step waits for it.
    weights_hidden = min(weights, target / accumulation(work, gpus)) if _gathers_late(work) else 0.0
    shards = replicas if work.zero_stage else 1
    moved = _BYTES_OF_ADAM * work.parameters + _BYTES_OF_AVERAGE * work.encoder_parameters
    return StepTime(
        target=target,
        context_encoder=encoder,
        predictor=predictor,
        recomputed=recomputed,
        bubble=trained * waits,
        update=moved / work.stages / shards / (1e9 * MEMORY_EFFICIENCY * cluster.gpu.bandwidth),
        reduce_exposed=reduce - hidden,
        reduce_hidden=hidden,
        weights_exposed=weights - weights_hidden,
        weights_hidden=weights_hidden,
        average_exposed=_average(work, cluster, traffic.gathered_average),
        stages_exposed=traffic.between_stages / (1e9 * LINK_EFFICIENCY * _link_of_stages(work, cluster)),
    )


def _share_of_dearest(work: Workload) -> float:
    """Of the trained layers' arithmetic, the part of the stage that has most of it."""
    bounds = split_layers(work.layer_costs, work.stages)
    return max(sum(work.layer_costs[a:b]) for a, b in itertools.pairwise(bounds)) / sum(work.layer_costs)


def _hidden_reduction(work: Workload, reduce: float, backward: float) -> float:
    """Seconds of the reductions that run beside the backward passes: those of all but each one's last bucket."""
    zero = work.settings["zero_optimization"]
    if work.zero_stage != 2 or not zero.get("overlap_comm") or not reduce:
        return 0.0
    last = min(1.0, int(zero["reduce_bucket_size"]) / work.parameters)
    return min(reduce * (1 - last), backward)


def _gathers_late(work: Workload) -> bool:
    """Whether the gather of weights is begun after the step, as ours is where DeepSpeed lets us."""
    return work.stages == 1 and work.zero_stage > 0 and not (work.zero_stage == 1 and work.has_separate_sums)


def _average(work: Workload, cluster: Cluster, size: float) -> float:
    """The target encoder waits for it. With stages each slice first goes to the other stages, once over their link."""
    replicas = cluster.gpus // work.stages
    rate = 1e9 * LINK_EFFICIENCY
    seconds = size * (replicas - 1) / replicas / (rate * cluster.bandwidth(replicas))
    if work.stages > 1:
        seconds += size / replicas / (rate * _link_of_stages(work, cluster))
    return seconds


def _link_of_stages(work: Workload, cluster: Cluster) -> float:
    """GB/s from a GPU to its next stage where all of a node's GPUs send at once, if that is in another node."""
    if cluster.network is None or work.stages == 1:
        return cluster.gpu.link
    sending = min(cluster.gpus // work.stages, cluster.per_node)
    return min(cluster.gpu.link, cluster.network.of_node(cluster.per_node) / sending)
