"""Counter-based random numbers: everything random is a pure function of (seed, purpose, epoch or step, sample).

splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) as a hash: a stream is a
64-bit key, its n-th number is the mixed value of key + n * GOLDEN. Nothing is stored between draws, so the numbers of
a sample do not depend on batch, rank, world size, worker count or on where a run was resumed. Compiled by numba, since
the loader's threads call these functions.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Purposes keep streams apart that share seed, step and sample. Never renumber: it changes every run.
ORDER, CROP, MASK, BLOCK_SIZE, FLIP, NOISE, PREDICTED = 1, 2, 3, 4, 5, 6, 7
SUBSET = 20  # which images a few-shot draw takes

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_ONE = np.uint64(1)


@njit(cache=True)
def mix(value):
    """splitmix64's finaliser: a bijection of uint64."""
    value = np.uint64(value)
    value = (value ^ (value >> _S30)) * _MIX_1
    value = (value ^ (value >> _S27)) * _MIX_2
    return value ^ (value >> _S31)


@njit(cache=True)
def stream(seed, purpose, time, sample):
    """The key of a random stream, uint64. ``time`` is an epoch or a step, whichever the purpose counts in."""
    key = mix(np.uint64(seed) + GOLDEN)
    key = mix(key ^ (np.uint64(purpose) + GOLDEN))
    key = mix(key ^ (np.uint64(time) + GOLDEN))
    return mix(key ^ (np.uint64(sample) + GOLDEN))


@njit(cache=True)
def uniform(key, counter):
    """The ``counter``-th number of a stream, float64 in [0, 1)."""
    bits = mix(key + (np.uint64(counter) + _ONE) * GOLDEN)
    return np.float64(bits >> _S11) * (1.0 / 9007199254740992.0)


@njit(cache=True)
def below(key, counter, limit):
    """The ``counter``-th number of a stream as an integer in [0, limit)."""
    return np.int64(uniform(key, counter) * limit)


@njit(cache=True, nogil=True)  # some 0.3 s for ImageNet-22k, made by a thread beside the training
def _sort_keys(seed, purpose, time, num_samples):
    keys = np.empty(num_samples, np.uint64)
    for sample in range(num_samples):
        keys[sample] = stream(seed, purpose, time, sample)
    return keys


def permutation(seed: int, epoch: int, num_samples: int, *, purpose: int = ORDER) -> np.ndarray:
    """The order of the samples in an epoch, int64 [num_samples]. Ours and not numpy's, whose streams may change."""
    return np.argsort(_sort_keys(np.uint64(seed), purpose, epoch, num_samples), kind="stable")
