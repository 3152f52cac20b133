"""Gaussian noise on the device that is a pure function of a key, a target block and a patch.

The counter-based numbers of :mod:`ijepa_ds.random_streams` in torch's integers, so that the same noise arrives on any
device, for any number of processes and after a resume, and nothing but the keys travels to the device.

Shapes: B images, M target blocks, T tokens of a target block, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ijepa_ds.random_streams import GOLDEN

# As torch has them: signed, with the same bits.
_GOLDEN, _MIX_1, _MIX_2 = (
    constant - 2**64 if constant >= 2**63 else constant
    for constant in (int(GOLDEN), 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_HALF = 2.0**-24  # a float32 below 1 has 24 bits


def gaussian(keys: Tensor, patches: Tensor, *, num_patches: int, width: int) -> Tensor:
    """Standard normal numbers, fp32 [M, B, T, D], for keys int64 [B] and patches int64 [M, B, T], each < num_patches.

    ``width`` D must be even: a hash of 64 bits makes two numbers (Box and Muller, 1958).
    """
    block = torch.arange(len(patches), device=patches.device)[:, None, None]
    places = (block * num_patches + patches)[..., None] * (width // 2)  # [M, B, T, 1]
    counters = places + torch.arange(1, width // 2 + 1, device=patches.device)  # [M, B, T, D / 2]
    bits = mix(keys[None, :, None, None] + counters * _GOLDEN)
    first = ((bits >> 40) & 0xFFFFFF).float().add_(1).mul_(_HALF)  # (0, 1]: its logarithm is taken
    second = ((bits >> 8) & 0xFFFFFF).float().mul_(2 * math.pi * _HALF)
    radius = first.log_().mul_(-2).sqrt_()
    return torch.cat([radius * second.cos(), radius * second.sin()], dim=-1)


def mix(value: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, bit for bit :func:`ijepa_ds.random_streams.mix` on uint64."""
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
