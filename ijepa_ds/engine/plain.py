"""Plain torch in one process, without DeepSpeed: what replays and imports need, and what ZeRO is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ijepa_ds.distributed import Process
from ijepa_ds.engine.shards import replicated_shards
from ijepa_ds.engine.trainable import Batch, Outcome, ShardedTrainable
from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.optimizer import build_optimizer, gate, set_hyperparameters
from ijepa_ds.method.schedules import Hyperparameters


class Plain(ShardedTrainable):
    """A :class:`~ijepa_ds.engine.trainable.Trainable` in fp32."""

    layout = "plain"

    def __init__(
        self,
        model: IJEPA,
        target: VisionTransformer,
        *,
        betas: tuple[float, float],
        eps: float,
        to_input: Callable[[Tensor], Tensor],
        device: torch.device | None = None,
    ) -> None:
        process = Process(0, 1, device or torch.device("cpu"))
        model = model.to(process.device)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        adam = build_optimizer(model.named_parameters(), betas=betas, eps=eps)
        groups = [group["params"] for group in adam.param_groups]
        shards = replicated_shards(groups, groups, adam.param_groups, names)
        super().__init__(model, target, shards, adam, process, to_input=to_input)

    def step(self, batches: Iterator[Batch], now: Hyperparameters) -> Outcome:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        set_hyperparameters(self.adam, now)
        self.adam.zero_grad()
        losses = []
        for batch in batches:
            images = self.to_input(batch.images)
            targets = self.target_encoder(images, batch.target_blocks)
            loss = self.module(images, batch.context_block, batch.target_blocks, targets, batch.keys)
            loss.backward()
            losses.append(loss.detach().float())
        gradients = {name: parameter.grad for name, parameter in self._trained().items() if parameter.grad is not None}
        torch._foreach_div_(list(gradients.values()), float(len(losses)))
        if self.watch_gradients is not None:
            self.watch_gradients(gradients)
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        applied = gate(self.adam, norm)
        self.wait_for_reader()
        self.adam.step()
        self.average.update(now.momentum, applied)
        return Outcome(torch.stack(losses), applied, norm)

    def describe(self) -> str:
        """See :class:`~ijepa_ds.engine.trainable.Trainable`."""
        return "plain torch, torch.float32"
