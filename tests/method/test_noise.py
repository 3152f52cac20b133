"""Noise that depends on a key, a block and a patch, and on nothing else."""

from __future__ import annotations

import numpy as np
import torch

from ijepa_ds import random_streams
from ijepa_ds.method.noise import gaussian, mix

PATCHES = torch.arange(24).reshape(2, 3, 4)  # [M, B, T]
KEYS = torch.tensor([1, -(2**63), 2**62 + 12345])


def noise(keys=KEYS, patches=PATCHES, width: int = 16) -> torch.Tensor:
    return gaussian(keys, patches, num_patches=24, width=width)


def test_the_mixing_is_that_of_the_loaders_streams():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    with np.errstate(over="ignore"):
        expected = np.array([random_streams.mix(value) for value in values], np.uint64)
    assert (mix(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64) == expected).all()


def test_a_patch_has_its_noise_wherever_it_stands():
    whole = noise()
    assert whole.shape == (2, 3, 4, 16) and whole.dtype == torch.float32
    order = torch.tensor([2, 0, 1])
    assert torch.equal(noise(KEYS[order], PATCHES[:, order]), whole[:, order])  # other ranks, other micro-batches
    assert torch.equal(noise(patches=PATCHES.flip(2)), whole.flip(2))
    assert torch.equal(noise(patches=PATCHES[:1]), whole[:1])


def test_another_key_block_or_patch_has_another_noise():
    alike = noise(torch.tensor([5, 5, 6]), torch.tensor([7, 8, 9, 7]).expand(2, 3, 4))
    assert torch.equal(alike[:, 0], alike[:, 1])  # the same key
    assert torch.equal(alike[:, :, 0], alike[:, :, 3])  # the same patch
    different = torch.cat([alike[:, ::2, :3].flatten(0, 2)])  # block, key and patch differ
    assert len(torch.unique(different, dim=0)) == 2 * 2 * 3


def test_the_numbers_are_normal_and_not_correlated():
    values = gaussian(torch.arange(64), torch.arange(64).expand(2, 64, 64), num_patches=64, width=32).flatten(0, 2)
    assert len(values) == 8192 and values.isfinite().all()
    assert values.mean(0).abs().max() < 0.06  # a deviation is 0.011
    assert (values.var(0) - 1).abs().max() < 0.08  # 0.016
    assert (values.pow(4).mean(0) - 3).abs().max() < 0.6  # 0.11: of the normal distribution, and not of a uniform one
    correlations = torch.corrcoef(values.T) - torch.eye(32)
    assert correlations.abs().max() < 0.06
