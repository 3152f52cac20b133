"""Variance and covariance of the mean context, beside I-JEPA's loss: C-JEPA (Mo and Tong, NeurIPS 2024, 2410.19560).

I-JEPA's loss alone is content with features that span few dimensions. VICReg's terms (Bardes et al., ICLR 2022,
2105.04906) ask every dimension of a projection to vary between images, and each to vary by itself.

Shapes: B images, G images of a group, K context tokens, D encoder width, Z width of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ijepa_ds.method.encoder import initialize

_EPS = 1e-4  # of a variance, as VICReg has it


@dataclass(frozen=True)
class Terms:
    """Of the loss, each a scalar: means over groups."""

    variance: Tensor  # by how much the deviation of a dimension falls short of 1
    covariance: Tensor  # squares off the diagonal, over Z


class VarianceCovariance(nn.Module):
    """The two terms of groups of ``group`` images.

    A group lies within one micro-batch and is of the same images for any number of processes and any micro-batch, so
    that the loss does not depend on how a step is shared. Nothing of it is trained beyond pretraining.

    Args:
        width: D.
        hidden: Z, and the width of the layer before; 0 takes the mean context as it is.
        group: images of which the statistics are; it divides B.
        variance: weight of the variance term, as ``covariance``.
        generator: of the initial weights.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        group: int,
        variance: float,
        covariance: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.group, self.variance, self.covariance = group, variance, covariance
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)] if hidden else []
        self.layers = nn.Sequential(*layers)
        initialize(self, generator)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):  # at std 0.02 nothing of a narrow network would arrive
                nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)

    def forward(self, context: Tensor) -> Tensor:
        """context [B, K, D] -> scalar, fp32: the weighted sum of both terms."""
        terms = self.terms(context)
        return self.variance * terms.variance + self.covariance * terms.covariance

    def terms(self, context: Tensor) -> Terms:
        """Both, not weighted."""
        projected = self.layers(context.mean(dim=1)).float()  # [B, Z]
        with torch.autocast(projected.device.type, enabled=False):  # products of deviations in bf16 lose the small ones
            return variance_and_covariance(projected.unflatten(0, (-1, self.group)))


def variance_and_covariance(features: Tensor) -> Terms:
    """features [groups, G, Z], fp32 -> VICReg's terms, of unbiased estimates."""
    centred = features - features.mean(dim=1, keepdim=True)
    deviations = (centred.square().sum(dim=1) / (features.shape[1] - 1) + _EPS).sqrt()  # [groups, Z]
    covariances = centred.transpose(1, 2) @ centred / (features.shape[1] - 1)  # [groups, Z, Z]
    squares = covariances.square().sum(dim=(1, 2)) - covariances.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return Terms((1 - deviations).relu().mean(), squares.mean() / features.shape[2])
