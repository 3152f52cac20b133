"""Everything that a plan says, as numbers: what fits, how long it takes, what it costs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ijepa_ds.plan.gpus import Cluster
from ijepa_ds.plan.images import MEASURED_IN, Images
from ijepa_ds.plan.memory import HEADROOM, OUTSIDE, Memory, memory_of, memory_of_stages
from ijepa_ds.plan.timing import LINK_EFFICIENCY, accumulation, step_time, traffic_of
from ijepa_ds.plan.workload import Workload
from ijepa_ds.stage_balance import bubble

_GB = 1e9
_EASY = 0.75  # of the room: a larger micro-batch that takes more is not advised, since what it saves is little
_HOST_PROCESS = 6e9  # bytes of host memory of a training process beside its buffers: assumed


@dataclass(frozen=True)
class Terms:
    """What the prediction takes for granted. ``price``: of a GPU hour; ``host_memory``: GB of a node."""

    efficiency: float = 0.5
    price: float | None = None
    host_memory: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run on a cluster."""

    work: Workload
    cluster: Cluster
    images: Images
    terms: Terms
    largest_bubble: float = 1.0

    @property
    def room(self) -> float:
        """Bytes of a GPU that are of use."""
        return self.cluster.gpu.memory * _GB * HEADROOM

    @property
    def replicas(self) -> int:
        """GPUs, or pipelines of GPUs, that share a batch."""
        return self.cluster.gpus // self.work.stages

    def memory(self, *, micro_batch: int | None = None, checkpointed: bool | None = None) -> Memory:
        """Of the fullest GPU."""
        return memory_of(self.work, self.cluster.gpus, micro_batch=micro_batch, checkpointed=checkpointed)

    def fits(self, **changes: Any) -> bool:
        """Whether the run, with what :meth:`memory` takes, has enough memory."""
        return self.memory(**changes).total <= self.room

    def largest_micro_batch(self, *, checkpointed: bool | None = None, room: float | None = None) -> int | None:
        """The most images at once that divide a replica's share of a step and fit into the room; None: not one does."""
        share, stages = self.work.global_batch // self.replicas, self.work.stages
        sizes = [n for n in range(stages, share + 1, stages) if share % n == 0]
        usable = [n for n in sizes if bubble(stages, share // n) <= self.largest_bubble]
        limit = room or self.room
        memory = ((n, self.memory(micro_batch=n, checkpointed=checkpointed).total) for n in reversed(usable))
        return next((n for n, total in memory if total <= limit), None)

    def needs_stages(self) -> bool:
        """Whether no micro-batch fits under ZeRO 2 without stages, not even with checkpointing."""
        settings = {**self.work.settings, "zero_optimization": {**self.work.settings["zero_optimization"], "stage": 2}}
        settings["zero_optimization"].setdefault("reduce_bucket_size", 50_000_000)
        whole = dataclasses.replace(self.work, stages=1, settings=settings)
        return memory_of(whole, self.cluster.gpus, micro_batch=1, checkpointed=True).total > self.room

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, round(self.images.count // self.work.global_batch * self.work.epochs))

    def hours(self) -> float:
        """From the first step to the last, without start, probes and pauses."""
        return self.num_steps * step_time(self.work, self.cluster, self.terms.efficiency).total / 3600


def numbers(plan: Plan) -> dict[str, Any]:
    """The plan under plain keys: GB of 1e9 bytes, GFLOP of an image, seconds of a step where nothing else is said."""
    work, memory = plan.work, plan.memory()
    seconds = step_time(work, plan.cluster, plan.terms.efficiency)
    rate, hours = work.global_batch / seconds.total, plan.hours()
    gpu_hours = hours * plan.cluster.gpus
    return {
        "kind": "prediction",
        "parameters": work.parameters,
        "memory_gb": memory.total / _GB,
        "fits": memory.total <= plan.room,
        "largest_micro_batch": plan.largest_micro_batch(),
        "checkpointing_needed": not plan.fits(checkpointed=False),
        "stages_needed": plan.needs_stages(),
        "gflop_per_image": work.flops.total / 1e9,
        "images_per_second": rate,
        "hours": hours,
        "gpu_hours": gpu_hours,
        "cost": None if plan.terms.price is None else gpu_hours * plan.terms.price,
        "steps": plan.num_steps,
        "cluster": _cluster(plan),
        "batch": _batch(plan),
        "parameters_of": _parameters(work),
        "memory_of": {name: value / _GB for name, value in memory.parts().items()},
        "memory_of_stages": [memory.total / _GB for memory in memory_of_stages(work, plan.cluster.gpus)],
        "activations_gb": _activations(plan),
        "gflop_of": {name: value / 1e9 for name, value in vars(work.flops).items()},
        "tokens": _tokens(work),
        "traffic_gb": {name: value / _GB for name, value in vars(traffic_of(work, plan.cluster.gpus)).items()},
        "step_seconds": {**vars(seconds), "total": seconds.total},
        "share_of_peak": plan.terms.efficiency * seconds.arithmetic / seconds.total,
        "loader": _loader(plan, rate),
        "advice": advice(plan),
        "assumptions": assumptions(plan),
    }


def _cluster(plan: Plan) -> dict[str, Any]:
    cluster = plan.cluster
    return {
        "gpu": cluster.gpu.name,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "interconnect": cluster.network.name if cluster.network else None,
        "gpu_memory_gb": cluster.gpu.memory,
        "usable_memory_gb": plan.room / _GB,
    }


def _batch(plan: Plan) -> dict[str, Any]:
    work = plan.work
    micro_batches = accumulation(work, plan.cluster.gpus)
    return {
        "global": work.global_batch,
        "micro": work.micro_batch,
        "micro_batches": micro_batches,
        "zero_stage": work.zero_stage,
        "stages": work.stages,
        "replicas": plan.replicas,
        "bubble": bubble(work.stages, micro_batches),
        "checkpointed": work.checkpointed,
    }


def _parameters(work: Workload) -> dict[str, int]:
    encoder = work.encoder_parameters
    return {"context_encoder": encoder, "predictor": work.parameters - encoder, "target_encoder": encoder}


def _activations(plan: Plan) -> dict[str, float]:
    eager, checkpointed = (plan.memory(checkpointed=ways).activations / _GB for ways in (False, True))
    return {"eager": eager, "compiled": eager, "checkpointed": checkpointed}


def _tokens(work: Workload) -> dict[str, Any]:
    tokens = work.tokens
    return {
        "patches": work.shapes.num_patches,
        "context": tokens.context,
        "largest_context": tokens.most_context,
        "target_mean": tokens.mean_target,
        "target_largest": tokens.most_target,
    }


def _loader(plan: Plan, rate: float) -> dict[str, Any]:
    loader, decoder = plan.images.rates
    of_node, cluster, work = rate / plan.cluster.nodes, plan.cluster, plan.work
    scratch = plan.images.scratch(work.micro_batch // work.stages)
    needed = plan.images.bytes + cluster.per_node * (_HOST_PROCESS + scratch)
    return {
        "images": plan.images.count,
        "images_from": plan.images.told,
        "images_per_second_of_a_node": of_node,
        "cores_of_a_node": math.ceil(of_node / loader),
        "cores_of_a_gpu": rate / cluster.gpus / loader,
        "workers": work.workers,
        "measured_images_per_second_of_a_core": loader,
        "measured_decoding_per_second_of_a_core": decoder,
        "measured_in": MEASURED_IN,
        "beton_gb": plan.images.bytes / _GB,
        "host_memory_needed_gb": needed / _GB,
        "host_memory_gb": plan.terms.host_memory,
        "beton_stays_in_memory": None if plan.terms.host_memory is None else needed <= plan.terms.host_memory * _GB,
    }


def advice(plan: Plan) -> list[str]:
    """What to change, each in a sentence; nothing where the run is well set."""
    said = _advice_on_memory(plan) if not plan.fits() else _advice_on_speed(plan)
    loader = _loader(plan, plan.work.global_batch / step_time(plan.work, plan.cluster, plan.terms.efficiency).total)
    if loader["cores_of_a_gpu"] > plan.work.workers:
        cores = math.ceil(loader["cores_of_a_gpu"])
        said.append(f"each GPU needs {cores} decoding threads: set ijepa.data.workers to {cores} or more")
    if loader["beton_stays_in_memory"] is False:
        said.append(
            f"a node of {plan.terms.host_memory:g} GB cannot keep the {loader['beton_gb']:.0f} GB of images in memory: "
            "put them on a fast local disk, or convert them with a smaller --max-resolution"
        )
    return said


def _advice_on_memory(plan: Plan) -> list[str]:
    gpu = f"{plan.cluster.gpu.name} ({plan.room / _GB:.0f} GB of use)"
    smaller = plan.largest_micro_batch()
    said = [f"{plan.memory().total / _GB:.1f} GB do not fit on {gpu}"]
    if smaller:
        said.append(f"set train_micro_batch_size_per_gpu to {smaller}: the recipe stays the same")
    if not plan.work.checkpointed and plan.fits(checkpointed=True):
        said.append("or set ijepa.model.activation_checkpointing to true: a third more arithmetic in what is trained")
    elif not smaller and plan.largest_micro_batch(checkpointed=True):
        said.append(
            "set ijepa.model.activation_checkpointing to true, and train_micro_batch_size_per_gpu to "
            f"{plan.largest_micro_batch(checkpointed=True)}"
        )
    if len(said) == 1:
        said.append("nothing helps but more GPUs, GPUs with more memory, or more of ijepa.pipeline.stages")
    return said


def _advice_on_speed(plan: Plan) -> list[str]:
    work, said = plan.work, []
    plain = plan.fits(checkpointed=False)
    if work.checkpointed and plain:
        saved = step_time(work, plan.cluster, plan.terms.efficiency).recomputed
        share = saved / step_time(work, plan.cluster, plan.terms.efficiency).total
        said.append(
            f"activation_checkpointing is not needed: {plan.memory(checkpointed=False).total / _GB:.1f} GB fit without "
            f"it; ijepa.model.activation_checkpointing = false saves {share:.0%} of the time"
        )
    larger = plan.largest_micro_batch(checkpointed=work.checkpointed and not plain, room=_EASY * plan.room)
    micro_batches = accumulation(work, plan.cluster.gpus)
    if larger and larger > work.micro_batch and plan.replicas > 1 and work.stages == 1:
        again = ", each of which sums all gradients over the GPUs" if work.zero_stage == 2 else ""
        said.append(
            f"{larger} images fit easily where {work.micro_batch} are taken at once: train_micro_batch_size_per_gpu = "
            f"{larger} makes {work.global_batch // (larger * plan.replicas)} of the {micro_batches} micro-batches of a "
            f"step{again}"
        )
    if work.stages > 1 and not plan.needs_stages():
        said.append("stages are not needed: the run fits under ZeRO 2 without (ijepa.pipeline.stages = 1)")
    return said


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on."""
    gpu, work, terms = plan.cluster.gpu, plan.work, plan.terms
    peak = gpu.bf16 if work.dtype.itemsize == 2 else gpu.fp32
    precision = "bf16" if work.dtype.itemsize == 2 else "fp32"
    said = [
        "these are predictions by arithmetic: nothing of this project has been measured on a GPU yet",
        f"products reach {terms.efficiency:.0%} (--efficiency) of {peak:g} TFLOP/s, the data sheet's dense {precision} "
        f"peak of {gpu.name}",
        f"links reach {LINK_EFFICIENCY:.0%} of their data sheets: {gpu.link:g} GB/s between the GPUs of a node"
        + (f", {plan.cluster.network.name} between nodes" if plan.cluster.network else ""),
        f"{1 - HEADROOM:.0%} of the {gpu.memory:g} GB are lost between buffers; {OUTSIDE / _GB:g} GB are CUDA's and "
        "the libraries'",
        "memory is that of the largest target blocks, time that of the mean over the run's masks; activations as torch "
        "saves them with fused attention (a CPU test counts them); compiled blocks save as much",
        "start, compilation, probes, checkpoints and a data loader that is too slow are not in the time",
        f"cores by what one core of an AMD EPYC loads: {MEASURED_IN}",
    ]
    if not plan.images.is_measured:
        said.append(
            f"{plan.images.count:,} images ({plan.images.told}), a file in proportion to ImageNet's 65.5 GB at 512 px"
        )
    return said
