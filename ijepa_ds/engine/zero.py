"""The DeepSpeed engine around context encoder and predictor. All of deepspeed is imported here.

Attribute names of ZeRO's optimizers are internal and change between releases: the version is pinned, and
:func:`master_shards` is the one place that knows them.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing of DeepSpeed is compiled here
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every rank warns that it found none

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad

from ijepa_ds.config import Config
from ijepa_ds.distributed import Process, set_single_process_defaults, share_cpu_threads
from ijepa_ds.engine.shards import MasterShard, Placement, replicated_shards, set_masters
from ijepa_ds.errors import UserError
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.optimizer import build_optimizer


def init_distributed() -> Process:
    """Join the run's processes, or be the only one."""
    set_single_process_defaults()
    _quieten()
    # The shared memory communicator for CPU ranks is compiled for up to a minute at every first use, and gains nothing.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    share_cpu_threads()
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    on_cpu = accelerator.device_name() == "cpu"
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), local_rank)
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device, control)


def build_engine(model: IJEPA, config: Config) -> tuple[deepspeed.DeepSpeedEngine, list[MasterShard]]:
    """The only ``deepspeed.initialize``. The masters get the model's exact fp32 weights, not their bf16 roundings."""
    optimization = config.ijepa.optimization
    exact = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, betas=optimization.betas, eps=optimization.eps)
    settings = {key: value for key, value in config.deepspeed.items() if value != {}}
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise UserError(f"DeepSpeed refuses this configuration: {' '.join(str(error).split())}") from error
    shards = master_shards(engine)
    set_masters(shards, exact)
    if engine.optimizer is optimizer:
        _skip_steps_without_finite_gradients(optimizer)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for shard in shards:  # ZeRO 0 with bf16 has taken a step with zero gradients: AdamW would count one too many
        for value in inner.state.get(shard.adam_key, {}).values():
            value.zero_()
    return engine, shards


def _skip_steps_without_finite_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Do for torch's optimizer, which ZeRO 0 without bf16 runs as it is, what DeepSpeed's own do."""
    optimizer.overflow = False  # where DeepSpeed's engine looks whether a step was skipped

    def check(*_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        optimizer.overflow = not bool(norm.isfinite())  # the same on all ranks, which share the gradients
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers pass over these

    optimizer.register_step_pre_hook(check)


def master_shards(engine: deepspeed.DeepSpeedEngine) -> list[MasterShard]:
    """This rank's fp32 master weights, whichever optimizer DeepSpeed has chosen for ZeRO stage and precision."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
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
        first = dist.get_rank(process_group) * master.numel()
        placements = []
        for parameter in members[index]:
            # Each parameter is a view of the flat tensor: its own offset, alignment included.
            assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            start = parameter.storage_offset() - flat.storage_offset()
            placements.append(Placement(names[id(parameter)], start, parameter.shape))
        sharded = process_group if dist.get_world_size(process_group) > 1 else None
        adam_key = group["params"][0]
        shards.append(MasterShard(group["name"], tuple(placements), first, master.data, flat.data, sharded, adam_key))
    return shards


def adam_state(engine: deepspeed.DeepSpeedEngine, shard: MasterShard) -> dict[str, torch.Tensor]:
    """AdamW's state of a shard: ``step`` (scalar), ``exp_avg`` and ``exp_avg_sq`` [P]; made before the first step."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = optimizer.state[shard.adam_key]
    if not state:
        fused = optimizer.defaults.get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=shard.master.device if fused else "cpu")
        state["exp_avg"] = torch.zeros_like(shard.adam_key)
        state["exp_avg_sq"] = torch.zeros_like(shard.adam_key)
    return state


def gradients(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter name, averaged over the ranks; between ``backward`` and ``step``, on every rank."""
    trained = ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
    return {name: safe_get_full_grad(parameter) for name, parameter in trained}


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """The global gradient norm of the last step, where DeepSpeed computes one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _quieten() -> None:
    """DeepSpeed reports every step of its set-up; only its warnings are of use to a reader of the console."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*no current CUDA context.*")
