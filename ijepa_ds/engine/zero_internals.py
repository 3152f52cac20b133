"""What of DeepSpeed's ZeRO optimizers is not public, all in one place; names hold for the version that setup.py pins.

DeepSpeed ends every optimizer step with reads of the device: whether a gradient overflowed, its norm, the end of the
overlapped reduction. A host that waits cannot run ahead, so here the same is done on the device: the norm decides there
whether AdamW moves anything, and streams wait for streams.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa_ds.engine.shards import MasterShard, Placement, replicated_shards
from ijepa_ds.errors import UserError

if TYPE_CHECKING:
    import deepspeed

_NEVER = 10**9  # steps_per_print, where a configuration says none


def initialize(model: nn.Module, adam: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a model: that of its pipelines, if the model is one.

    Raises:
        UserError: DeepSpeed refuses the settings.
    """
    import deepspeed

    try:
        return deepspeed.initialize(model=model, optimizer=adam, config=without_host_reads(settings))[0]
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise UserError(f"DeepSpeed refuses this configuration: {' '.join(str(error).split())}") from error


def without_host_reads(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings without what waits for the device, as far as they do not ask for it themselves.

    Clipping is left out: :class:`~ijepa_ds.engine.zero.Zero` does it.
    """
    ours = copy.deepcopy({key: value for key, value in settings.items() if value != {}})
    # On by default, it waits for the device twice a micro-batch to report a speed that the monitor reports too.
    ours.setdefault("timers", {"throughput": {"enabled": False}})
    if ours.get("torch_autocast"):  # only steers communication: Linear's gradients would travel in bf16
        ours["torch_autocast"].setdefault("lower_precision_safe_modules", [])
    zero = ours.get("zero_optimization", {})
    if zero.get("stage", 0):
        zero.setdefault("parameter_alignment", True)  # products of misaligned bf16 weights are slow, or copy them
        if not _has_own_skip(ours):
            ours["gradient_clipping"] = 0.0
            zero.setdefault("compute_grad_norm", False)
            if ours.get("bf16"):
                ours["bf16"].setdefault("check_grad_overflow", False)
    elif not ours.get("bf16"):
        ours["gradient_clipping"] = 0.0
    return ours


def without_timers(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keep a pipeline's engine from noting when each step began and ended, unless it prints it some day.

    It notes them always, as events of the device, and forgets them when it prints: by default never.
    """
    from deepspeed.utils.timer import NoopTimer

    every = engine.steps_per_print()
    if every is None or every >= _NEVER:
        engine.timers = NoopTimer()


def _has_own_skip(settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed takes BF16_Optimizer, which cannot be told to look at no norm."""
    sums = settings.get("data_types", {}).get("grad_accum_dtype")
    stage = settings["zero_optimization"]["stage"]
    return stage == 1 and bool(settings.get("bf16", {}).get("enabled")) and sums == "fp32"


def gradient_slices(engine: deepspeed.DeepSpeedEngine) -> list[Tensor] | None:
    """This rank's slices of the averaged gradients before a step.

    None where DeepSpeed's optimizer keeps them to itself, and looks itself whether they are finite (ZeRO 0 with bf16,
    ZeRO 1 with bf16 and fp32 sums).
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups = optimizer.averaged_gradients.values()
        if all(getattr(group, "flat_partition", None) is not None for group in groups):  # fp32 sums of bf16
            return [group.flat_partition for group in groups]
        return [gradient for group in groups for gradient in group]
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO 0 with fp32
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return None


@contextlib.contextmanager
def weights_not_gathered() -> Iterator[None]:
    """Keep the steps of ZeRO's optimizer from gathering the ranks' new weights: the caller does it later."""
    from deepspeed.runtime.zero import stage_1_and_2

    gather = stage_1_and_2.all_gather_dp_groups
    stage_1_and_2.all_gather_dp_groups = lambda **_: None
    try:
        yield
    finally:
        stage_1_and_2.all_gather_dp_groups = gather


def order_reductions_on_the_device(optimizer: Any) -> None:
    """Let the stream that computes wait for the overlapped reductions, where DeepSpeed makes the host wait.

    Safe, because what the reduction's stream makes or frees is ordered with the other already: it waits for the
    producers of a bucket before it reads one, buckets are freed after the wait that is put here, and the buffer of the
    sums, made on the reduction's stream, is used again only after that stream has waited for its reader.
    """
    if not getattr(optimizer, "overlap_comm", False):
        return
    from deepspeed.accelerator import get_accelerator

    accelerator, epilogue = get_accelerator(), optimizer.independent_gradient_partition_epilogue
    if accelerator.current_stream() is None:
        return  # a CPU has no streams

    def wait_for_stream(*_: object) -> None:
        accelerator.current_stream().wait_stream(optimizer.reduction_stream)

    def epilogue_without_wait() -> None:
        synchronize = accelerator.synchronize
        accelerator.synchronize = wait_for_stream
        try:
            epilogue()
        finally:
            accelerator.synchronize = synchronize

    optimizer.independent_gradient_partition_epilogue = epilogue_without_wait


def master_shards(engine: deepspeed.DeepSpeedEngine, names: dict[int, str]) -> list[MasterShard]:
    """This rank's fp32 master weights, whichever optimizer DeepSpeed has chosen for ZeRO stage and precision.

    ``names``: of the parameters, by id.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):  # ZeRO 2, and ZeRO 1 without fp32 accumulation of bf16
        flats, members = optimizer.bit16_groups_flat, optimizer.round_robin_bit16_groups
        masters = optimizer.single_partition_of_fp32_groups
    elif isinstance(optimizer, BF16_Optimizer):  # ZeRO 1, bf16, fp32 accumulation
        flats, members = optimizer.bf16_groups_flat, optimizer.bf16_groups
        masters = optimizer.fp32_groups_flat_partition
    elif isinstance(optimizer, FP16_UnfusedOptimizer):  # ZeRO 0, bf16
        return replicated_shards(optimizer.fp16_groups, optimizer.fp32_groups, optimizer.optimizer.param_groups, names)
    else:  # ZeRO 0, fp32: torch's AdamW itself
        groups = [group["params"] for group in optimizer.param_groups]
        return replicated_shards(groups, groups, optimizer.param_groups, names)
    shards = []
    for index, group in enumerate(optimizer.optimizer.param_groups):
        process_group = optimizer.real_dp_process_group[index]
        master, flat = masters[index], flats[index]
        placements = []
        for parameter in members[index]:
            # Each parameter is a view of the flat tensor: its own offset, alignment included.
            assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            start = parameter.storage_offset() - flat.storage_offset()
            placements.append(Placement(names[id(parameter)], start, parameter.shape))
        shards.append(
            MasterShard(
                group=group["name"],
                placements=tuple(placements),
                first=dist.get_rank(process_group) * master.numel(),
                length=master.numel(),
                process_group=process_group if dist.get_world_size(process_group) > 1 else None,
                master=master.data,
                weights=flat.data,
                adam_key=group["params"][0],
            )
        )
    return shards
