"""DeepSpeed's engine around context encoder and predictor, ZeRO 0 to 2.

DeepSpeed is imported when it is first needed: that takes seconds, and looks for its accelerator in the environment.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_ds.allocator import keep_freed_memory
from ijepa_ds.distributed import Process, share_cpu_threads
from ijepa_ds.engine.groups import join_groups
from ijepa_ds.engine.shards import fill
from ijepa_ds.engine.trainable import Batch, Outcome, ShardedTrainable
from ijepa_ds.engine.zero_internals import (
    gradient_slices,
    initialize,
    master_shards,
    order_reductions_on_the_device,
    weights_not_gathered,
)
from ijepa_ds.meeting import Card, join
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.optimizer import build_optimizer, gate, set_hyperparameters
from ijepa_ds.method.schedules import Hyperparameters


@functools.cache
def init_distributed() -> Process:
    """Join the run's processes, or be the only one; called again, it gives the same."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing of DeepSpeed is compiled here
    # Every T has buffers of its own size: without segments that grow, memory is lost between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every rank warns that it found none
    # DeepSpeed reports every step of its set-up; only its warnings are of use to a reader of the console.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*no current CUDA context.*")
    meeting = join()
    if not meeting.begun:
        meeting.agree("start", Card(meeting.node))
    import deepspeed
    import deepspeed.ops

    # The shared memory communicator for CPU ranks is compiled for up to a minute at every first use, and gains nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(meeting.ranks.as_environment())
    share_cpu_threads()
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
    backend = accelerator.communication_backend_name()
    device, control = join_groups(meeting, accelerator.device_name(), backend)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes the groups that are there
    return Process(meeting.ranks.rank, meeting.ranks.world_size, device, control)


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
        model = model.to(process.device)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        exact = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        adam = build_optimizer(model.named_parameters(), betas=betas, eps=eps)
        self.engine = initialize(model, adam, settings)
        order_reductions_on_the_device(self.engine.optimizer)
        shards = master_shards(self.engine, names)
        fill([(shard, shard.master) for shard in shards], exact)
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for shard in shards:  # ZeRO 0 with bf16 has taken a step with zero gradients: AdamW would count one too many
            for value in inner.state.get(shard.adam_key, {}).values():
                value.zero_()
        super().__init__(self.engine.module, target, shards, inner, process, to_input=to_input, autocast=autocast)
        self.largest_norm = float(settings.get("gradient_clipping", 0.0))
        self._gathers: list[dist.Work] = []
        self.module.register_forward_pre_hook(lambda *_: self.wait_for_weights())

    def step(self, batches: Iterator[Batch], now: Hyperparameters) -> Outcome:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        set_hyperparameters(self.engine.optimizer, now)
        losses = []
        for batch, images, targets in self.with_targets(batches):
            loss = self.engine(images, batch.context_block, batch.target_blocks, targets, batch.keys)
            self.engine.backward(loss)
            losses.append(loss.detach().float())
            if self.engine.is_gradient_accumulation_boundary():
                applied, norm = self._move_weights(now.momentum)
            else:
                self.engine.step()  # counts the micro-batch
        return Outcome(torch.stack(losses), applied, norm)

    def publish(self) -> None:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        self.wait_for_weights()
        super().publish()

    def describe(self) -> str:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        return f"ZeRO {self.engine.zero_optimization_stage()}, {self.target_encoder.dtype}"

    def _move_weights(self, momentum: float) -> tuple[Tensor, Tensor | None]:
        """AdamW's step and the average's: whether they were taken, and the gradient's norm."""
        if self.watch_gradients is not None:
            self.watch_gradients(self._gradients())
        self.wait_for_reader()
        gradients = gradient_slices(self.engine)
        if gradients is None:
            return self._move_weights_as_deepspeed(momentum)
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        if self.shards[0].process_group is not None:
            dist.all_reduce(square, group=self.shards[0].process_group)
        norm = square.sqrt()
        applied = gate(self.adam, norm, self.largest_norm)
        with weights_not_gathered():
            self.engine.step()
        self.average.update(momentum, applied)
        # After the average's: the target encoder's forward pass comes first, and needs none of these.
        works = [shard.gather(shard.weights) for shard in self.shards]
        self._gathers = [work for work in works if work is not None]
        return applied, norm

    def _move_weights_as_deepspeed(self, momentum: float) -> tuple[Tensor, Tensor | None]:
        """The same where DeepSpeed looks itself whether a gradient is finite, and makes the host wait for it."""
        self.engine.step()
        applied = torch.tensor(self.engine.was_step_applied(), device=self.process.device)
        self.average.update(momentum, applied)
        norm = self.engine.get_global_grad_norm()
        return applied, None if norm is None else torch.as_tensor(norm, device=self.process.device)

    def wait_for_weights(self) -> None:
        """Until the working weights hold every rank's part; each forward pass of the module does this first."""
        for work in self._gathers:
            work.wait()
        self._gathers = []

    def _gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, averaged over the ranks."""
        from deepspeed.utils import safe_get_full_grad

        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        return {name: safe_get_full_grad(parameter) for name, parameter in trained}
