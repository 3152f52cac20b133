"""DeepSpeed's own sections of a configuration: the keys of its release 0.19.8 that make sense here, each with its kind.

DeepSpeed reads most of its values as they come and stumbles over a wrong one later, at the first step or where it
prints; its own models are in a package that takes seconds to import. What only acts in ZeRO stage 3, which is not
used here, is accepted and has no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ijepa_ds.validation import Checked, Count, must

_MOST_ELEMENTS = 10**10  # of a bucket, which is allocated as a whole
_HALVES = ("float16", "torch.float16", "fp16", "half")


def _whole(value: Any) -> Any:
    """5e8 is a whole number, too: DeepSpeed's documentation writes sizes so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refused(reason: str) -> AfterValidator:
    return must(lambda value: not value, reason)


Elements = Annotated[int, Field(ge=1, le=_MOST_ELEMENTS), BeforeValidator(_whole)]
_Of3 = Annotated[int, Field(ge=0, le=2**63), BeforeValidator(_whole)]  # a size of stage 3
_OFFLOADED = _refused("is not supported: the target encoder's average lives beside the fp32 weights")
_ZENFLOW = _refused("is not supported: it takes another optimizer, whose fp32 weights the average does not find")


class Section(Checked):
    """A section of DeepSpeed's."""

    unknown: ClassVar[str] = "is not a key of DeepSpeed that this project uses"


class BFloat16(Section):
    """bf16 weights with fp32 masters."""

    enabled: bool = Field(default=False, description="bf16 weights that compute, fp32 masters that are trained")
    immediate_grad_update: bool = Field(
        default=False, description="add gradients to the fp32 sums as they come (ZeRO 1)"
    )
    check_grad_overflow: bool = Field(
        default=True,
        description="wait for the device at each step to look at gradients; they are looked at on it anyway",
    )
    bf16_master_weights_and_grads: Annotated[
        bool, _refused("would average bf16 masters, in which the target encoder hardly moves; leave it out")
    ] = False
    bf16_optimizer_states: Annotated[
        bool, _refused("needs bf16 masters, in which the target encoder hardly moves; leave it out")
    ] = False


class TorchAutocast(Section):
    """fp32 weights under torch's autocast, the released code's own numerics."""

    enabled: bool = Field(default=False, description="compute under autocast")
    dtype: Annotated[
        str,
        must(
            lambda name: name not in _HALVES,
            "needs loss scaling, which the target encoder's average does not follow; use bfloat16",
        ),
        must(lambda name: name in ("bfloat16", "torch.bfloat16"), "must be bfloat16"),
    ] = Field(default="bfloat16", description="of the products: bfloat16")
    lower_precision_safe_modules: list[
        Literal["torch.nn.Linear", "torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d"]
    ] = Field(default=[], description="classes whose gradients travel in bf16")


class DataTypes(Section):
    """Of what is summed."""

    grad_accum_dtype: Literal["fp32", "bf16"] | None = Field(
        default=None,
        description="of the sums of micro-batches' gradients: fp32 or bf16; fp32 with bf16 weights, if not said",
    )


class ZeroOptimization(Section):
    """DeepSpeed's ZeRO. Keys that act in stage 3 alone are accepted, too."""

    stage: Annotated[
        Any,
        must(
            lambda stage: type(stage) is int and stage in (0, 1, 2),
            "cannot be used: stage 3 would shard the weights that the target encoder's average is taken from; set 2, "
            "which holds even ViT-g on one 80 GB GPU",
        ),
    ] = Field(
        default=0,
        description="what is sharded: 1 the optimizer's state, 2 gradients too",
        json_schema_extra={"enum": [0, 1, 2]},
    )
    overlap_comm: bool | None = Field(
        default=None, description="sum gradients between processes while backward goes on"
    )
    reduce_bucket_size: Elements = Field(default=50_000_000, description="gradients that travel at once, in elements")
    allgather_bucket_size: Annotated[Elements, must(lambda size: size % 2 == 0, "must be even, as NCCL aligns it")] = (
        Field(default=500_000_000, description="weights that travel at once, in elements")
    )
    contiguous_gradients: bool = Field(default=True, description="copy gradients into one buffer as they come")
    reduce_scatter: bool = Field(default=True, description="reduce each gradient to its owner alone, not to all")
    use_multi_rank_bucket_allreduce: bool = Field(
        default=True, description="buckets that hold several owners' gradients"
    )
    allgather_partitions: bool = Field(default=True, description="collect weights in one operation, not by broadcasts")
    compute_grad_norm: bool = Field(
        default=True, description="wait for the device at each step to know the norm (stages 1, 2)"
    )
    load_from_fp32_weights: bool = Field(
        default=True, description="of DeepSpeed's checkpoints, which are not used here"
    )
    elastic_checkpoint: bool = Field(default=False, description="likewise")
    ignore_unused_parameters: bool = Field(default=True, description="accept parameters that get no gradient")
    parameter_alignment: bool = Field(default=True, description="begin each weight where products are fast")

    round_robin_gradients: Annotated[Any, _refused("breaks reading the fp32 weights; leave it out")] = None
    legacy_stage1: Annotated[Any, _refused("is no longer in DeepSpeed; leave it out")] = None
    offload_optimizer: Annotated[Any, _OFFLOADED] = None
    offload_param: Annotated[Any, _OFFLOADED] = None
    cpu_offload: Annotated[Any, _OFFLOADED] = None
    cpu_offload_param: Annotated[Any, _OFFLOADED] = None
    cpu_offload_use_pin_memory: Annotated[Any, _OFFLOADED] = None
    zenflow: Annotated[Any, _ZENFLOW] = None
    zero_quantized_weights: Annotated[Any, _refused("acts in stage 3 alone; leave it out")] = None
    zero_quantized_nontrainable_weights: Annotated[Any, _refused("acts in stage 3 alone; leave it out")] = None
    zero_quantized_gradients: Annotated[Any, _refused("acts in stage 3 alone; leave it out")] = None

    sub_group_size: _Of3 = 10**9
    stage3_prefetch_bucket_size: _Of3 = 50_000_000
    stage3_param_persistence_threshold: _Of3 = 100_000
    stage3_model_persistence_threshold: _Of3 = 2**63 - 1
    stage3_max_live_parameters: _Of3 = 10**9
    stage3_max_reuse_distance: _Of3 = 10**9
    stage3_module_granularity_threshold: _Of3 = 0
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    zero_hpz_partition_size: Annotated[int, Field(ge=1, le=1)] = 1
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class CommsLogger(Section):
    """What is said of communication, which then waits for the device."""

    enabled: bool = Field(default=False, description="note each operation's size and time")
    prof_all: bool = Field(default=True, description="all operations")
    prof_ops: list[str] = Field(default=[], description="or those of these names")
    verbose: bool = Field(default=False, description="print each at once")
    debug: bool = Field(default=False, description="with the function that called it")


class FlopsProfiler(Section):
    """DeepSpeed's count of a step's arithmetic; `tflops` in the log needs none of it."""

    enabled: bool = Field(default=False, description="profile one step")
    recompute_fwd_factor: float = Field(
        default=0.0, ge=0, le=10, description="of the forward pass that is computed again"
    )
    profile_step: Count = Field(default=1, description="which step")
    module_depth: int = Field(default=-1, ge=-1, le=1000, description="levels of modules that are shown; -1: all")
    top_modules: Annotated[Count, Field(le=10**6)] = Field(
        default=1, description="modules that are shown of each level"
    )
    detailed: bool = Field(default=True, description="print every module")
    output_file: str | None = Field(default=None, description="where to; null: to the console")


class ThroughputTimer(Section):
    """DeepSpeed's own rate, which waits for the device; the log has one that does not."""

    enabled: bool = Field(default=False, description="print samples per second")
    synchronized: bool = Field(default=True, description="wait for the device before each reading")


class Timers(Section):
    """DeepSpeed's timers."""

    throughput: ThroughputTimer = Field(default=ThroughputTimer(), description="its rate: `enabled`, `synchronized`")
