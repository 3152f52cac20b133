"""LARS and SGD for many heads at once: every tensor is [H, ...], and each head has its own rate and weight decay.

A matrix of a head makes a tensor of three dimensions, a vector one of two.
Only matrices are decayed and adapted; biases and BatchNorm's scale and shift are not (as usual for LARS, and in timm
what its parameter groups are for).
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = 0.9
TRUST, TRUST_EPS = 0.001, 1e-8  # timm's defaults


def lars_step(
    parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], *, lr: Tensor, weight_decay: Tensor
) -> None:
    """LARS (arXiv 1708.03888) in place, as ``timm.optim.Lars`` with its defaults and momentum 0.9.

    By these a head without weight decay is not adapted: it is plain SGD with momentum. Rates and decays are [H];
    gradients are used up; momenta are zeros before the first step.
    """
    for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
        if parameter.ndim == 3:
            weight_norm, gradient_norm = (tensor.flatten(1).norm(dim=1) for tensor in (parameter, gradient))
            trust = TRUST * weight_norm / (gradient_norm + weight_norm * weight_decay + TRUST_EPS)
            adapted = (weight_decay != 0) & (weight_norm > 0) & (gradient_norm > 0)
            trust = torch.where(adapted, trust, 1.0)
            gradient.addcmul_(parameter, _spread(weight_decay, parameter)).mul_(_spread(trust, gradient))
        momentum.mul_(MOMENTUM).add_(gradient)
        parameter.addcmul_(momentum, _spread(lr, parameter), value=-1)


def sgd_step(
    parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], *, lr: Tensor, weight_decay: Tensor
) -> None:
    """SGD with Nesterov momentum 0.9 in place, as ``torch.optim.SGD``; arguments as for :func:`lars_step`."""
    for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
        if parameter.ndim == 3:
            gradient.addcmul_(parameter, _spread(weight_decay, parameter))
        momentum.mul_(MOMENTUM).add_(gradient)
        gradient.add_(momentum, alpha=MOMENTUM)
        parameter.addcmul_(gradient, _spread(lr, parameter), value=-1)


def _spread(per_head: Tensor, like: Tensor) -> Tensor:
    return per_head.view(-1, *[1] * (like.ndim - 1))
