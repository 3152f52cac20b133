"""AdamW with the parameter groups of I-JEPA: no weight decay on biases and one-dimensional tensors.

The encoder's and the predictor's parameters stay in groups of their own, named, so that the flat tensors which ZeRO
makes of the encoder's groups hold nothing else: the target encoder's average mirrors them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ijepa_ds.method.schedules import Hyperparameters


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW over four named groups; learning rate and weight decay are set before each step.

    ``named_parameters``: of :class:`~ijepa_ds.method.ijepa.IJEPA`, or some of them; a group that would be empty is
    not made.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decay = "decay" if parameter.ndim > 1 else "no_decay"
            groups.setdefault(f"{name.split('.')[0]}/{decay}", []).append(parameter)
    parameters = [{"params": members, "name": name} for name, members in groups.items()]
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def gate(optimizer: torch.optim.Optimizer, norm: Tensor, largest: float = 0.0) -> Tensor:
    """Let the coming step of a fused AdamW move nothing where the gradient's ``norm`` is not finite.

    Weights, moments and counters stay to the last bit, and nobody waits for the device: fused optimizers read
    ``found_inf`` and ``grad_scale`` there. A ``largest`` norm above 0 clips the gradients to it. Returns whether the
    step moves anything, a bool scalar on the device.
    """
    applied = norm.isfinite()
    optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
    if largest > 0:
        optimizer.grad_scale = (norm / largest).clamp(min=1.0)  # type: ignore[attr-defined]  # gradients are divided by it
    return applied


def set_hyperparameters(optimizer: torch.optim.Optimizer, now: Hyperparameters) -> None:
    """Learning rate and weight decay of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = now.lr
        group["weight_decay"] = 0.0 if group["name"].endswith("no_decay") else now.weight_decay
