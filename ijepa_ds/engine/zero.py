"""DeepSpeed's engine around context encoder and predictor, ZeRO 0 to 2. All of deepspeed is imported here.

Attribute names of ZeRO's optimizers are internal and change between releases: the version is pinned, and
:func:`master_shards` is the one place that knows them. DeepSpeed is imported when it is first needed: that takes
seconds, and looks for its accelerator in the environment.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_ds.distributed import Process, set_single_process_defaults, share_cpu_threads
from ijepa_ds.engine.shards import MasterShard, Placement, fill, replicated_shards
from ijepa_ds.engine.trainable import Batch, Outcome, ShardedTrainable
from ijepa_ds.errors import UserError
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.optimizer import build_optimizer, set_hyperparameters
from ijepa_ds.method.schedules import Hyperparameters

if TYPE_CHECKING:
    import deepspeed


def init_distributed() -> Process:
    """Join the run's processes, or be the only one."""
    set_single_process_defaults()
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing of DeepSpeed is compiled here
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every rank warns that it found none
    # DeepSpeed reports every step of its set-up; only its warnings are of use to a reader of the console.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*no current CUDA context.*")
    import deepspeed
    import deepspeed.ops

    # The shared memory communicator for CPU ranks is compiled for up to a minute at every first use, and gains nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    share_cpu_threads()
    accelerator = deepspeed.get_accelerator()
    on_cpu, local_rank = accelerator.device_name() == "cpu", int(os.environ.get("LOCAL_RANK", 0))
    if not on_cpu:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(), local_rank)
    # A group of CPU tensors, to agree without waiting for the device.
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")
    assert isinstance(control, dist.ProcessGroup)
    return Process(dist.get_rank(), dist.get_world_size(), device, control)


class Zero(ShardedTrainable):
    """A :class:`~ijepa_ds.engine.trainable.Trainable` on DeepSpeed's engine, every process with a share of each batch.

    The masters start from the model's exact fp32 weights, not from their bf16 roundings.

    Args:
        model: context encoder and predictor; its weights become the engine's.
        target: the target encoder's architecture, on the meta device.
        process: of :func:`init_distributed`.
        settings: DeepSpeed's configuration.
        betas: of AdamW, as ``eps``.
        to_input: images of a batch -> the encoders' input [B, 3, H, W] in the working dtype.
        autocast: the dtype of torch_autocast, if it is on.

    Raises:
        UserError: DeepSpeed refuses the settings.
    """

    def __init__(
        self,
        model: IJEPA,
        target: VisionTransformer,
        process: Process,
        *,
        settings: dict[str, Any],
        betas: tuple[float, float],
        eps: float,
        to_input: Callable[[Tensor], Tensor],
        autocast: torch.dtype | None = None,
    ) -> None:
        import deepspeed

        model = model.to(process.device)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        exact = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        adam = build_optimizer(model, betas=betas, eps=eps)
        given = {key: value for key, value in settings.items() if value != {}}
        try:
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=given)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise UserError(f"DeepSpeed refuses this configuration: {' '.join(str(error).split())}") from error
        shards = master_shards(self.engine, names)
        fill([(shard, shard.master) for shard in shards], exact)
        if self.engine.optimizer is adam:
            _skip_steps_without_finite_gradients(adam)
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for shard in shards:  # ZeRO 0 with bf16 has taken a step with zero gradients: AdamW would count one too many
            for value in inner.state.get(shard.adam_key, {}).values():
                value.zero_()
        super().__init__(self.engine.module, target, shards, inner, process, to_input=to_input, autocast=autocast)

    def step(self, batches: Iterator[Batch], now: Hyperparameters) -> Outcome:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        set_hyperparameters(self.engine.optimizer, now)
        losses = []
        for batch in batches:
            images = self.to_input(batch.images)
            targets = self.target_encoder(images, batch.target_blocks)
            loss = self.engine(images, batch.context_block, batch.target_blocks, targets)
            self.engine.backward(loss)
            if self.watch_gradients is not None and self.engine.is_gradient_accumulation_boundary():
                self.watch_gradients(self._gradients())
            self.engine.step()  # after the last micro-batch alone does this move anything
            losses.append(loss.detach().float())
        applied = self.engine.was_step_applied()  # DeepSpeed skips a step with a gradient that is not finite
        if applied:
            self.average.update(now.momentum)
        norm = self.engine.get_global_grad_norm()  # -1 stands for one that is not finite
        return Outcome(torch.stack(losses), torch.tensor(applied), None if norm is None else torch.as_tensor(norm))

    def describe(self) -> str:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        return f"ZeRO {self.engine.zero_optimization_stage()}, {self.target_encoder.dtype}"

    def _gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, averaged over the ranks."""
        from deepspeed.utils import safe_get_full_grad

        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        return {name: safe_get_full_grad(parameter) for name, parameter in trained}


def _skip_steps_without_finite_gradients(adam: torch.optim.Optimizer) -> None:
    """Do for torch's optimizer, which ZeRO 0 without bf16 runs as it is, what DeepSpeed's own do."""
    adam.overflow = False  # type: ignore[attr-defined]  # where DeepSpeed's engine looks whether a step was skipped

    def check(*_: object) -> None:
        parameters = [p for group in adam.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        skipped = not bool(norm.isfinite())  # the same on all ranks, which share the gradients
        adam.overflow = skipped  # type: ignore[attr-defined]
        if skipped:
            for parameter in parameters:
                parameter.grad = None  # torch's optimizers pass over these

    adam.register_step_pre_hook(check)


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
