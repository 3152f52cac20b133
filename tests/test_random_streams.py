"""The random streams against splitmix64's published numbers, and what every mask, crop and order relies on."""

from __future__ import annotations

import numpy as np
import pytest

from ijepa_ds.random_streams import BLOCK_SIZE, CROP, GOLDEN, MASK, ORDER, below, mix, permutation, stream, uniform

PUBLISHED_SEED = 1234567
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def key_of(seed: int, purpose: int, time: int, sample: int) -> np.uint64:
    """A stream's key; outside of compiled code numba hands it over as a Python int, which is no key."""
    return np.uint64(stream(np.uint64(seed), purpose, time, sample))


def test_mix_gives_the_published_numbers_of_splitmix64():
    states = [np.uint64((PUBLISHED_SEED + (n + 1) * int(GOLDEN)) % 2**64) for n in range(5)]
    assert [int(mix(state)) for state in states] == PUBLISHED


def test_a_stream_is_splitmix64_started_at_its_key():
    numbers = [float(uniform(np.uint64(PUBLISHED_SEED), n)) for n in range(5)]
    assert numbers == [(value >> 11) / 2**53 for value in PUBLISHED]


def test_uniform_numbers_fill_the_interval_evenly():
    """Chi-square with 99 degrees of freedom, along one stream and across the first numbers of many samples."""
    key = key_of(3, MASK, 5, 7)
    along = np.array([uniform(key, n) for n in range(20_000)])
    across = np.array([uniform(key_of(3, MASK, 5, sample), 0) for sample in range(20_000)])
    for numbers in (along, across):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * np.sqrt(2 * 99)


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_below_reaches_every_integer_under_the_limit_equally_often(limit):
    key = key_of(0, CROP, 0, 0)
    counts = np.bincount([below(key, n, limit) for n in range(400 * limit)], minlength=limit)
    assert len(counts) == limit
    assert abs(counts - 400).max() < 5 * np.sqrt(400)


@pytest.mark.parametrize(
    "other",
    [(4, MASK, 5, 7), (3, CROP, 5, 7), (3, MASK, 6, 7), (3, MASK, 5, 8), (3, MASK, 7, 5), (5, MASK, 3, 7)],
    ids=["seed", "purpose", "time", "sample", "time and sample swapped", "seed and time swapped"],
)
def test_streams_that_differ_in_anything_are_uncorrelated(other):
    first, second = key_of(3, MASK, 5, 7), key_of(*other)
    numbers = np.array([[uniform(first, n), uniform(second, n)] for n in range(5_000)])
    assert not np.isin(numbers[:, 0], numbers[:, 1]).any()  # nor is one the other, some draws later
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 4 / np.sqrt(5_000)


def test_keys_of_neighbouring_samples_steps_seeds_and_purposes_never_collide():
    keys = {
        int(key_of(run, purpose, time, sample))
        for run in range(4)
        for purpose in (ORDER, CROP, MASK, BLOCK_SIZE)
        for time in range(25)
        for sample in range(50)
    }
    assert len(keys) == 4 * 4 * 25 * 50


@pytest.mark.parametrize("num_samples", [1, 2, 17, 5_000])
def test_a_permutation_holds_every_sample_once(num_samples):
    order = permutation(1, 2, num_samples)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_samples))


def test_permutations_differ_by_epoch_and_seed_and_are_the_same_again():
    order = permutation(0, 0, 1_000)
    assert (order == permutation(0, 0, 1_000)).all()
    for other in (permutation(0, 1, 1_000), permutation(1, 0, 1_000)):
        assert (order == other).sum() < 10  # one fixed point is expected
        assert abs(np.corrcoef(order, other)[0, 1]) < 4 / np.sqrt(1_000)


def test_every_position_of_an_epoch_holds_every_sample_equally_often():
    counts = np.zeros((6, 6))
    for epoch in range(3_000):
        counts[np.arange(6), permutation(0, epoch, 6)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(500)


def test_streams_are_what_they_always_were():
    """Golden numbers: whoever changes one changes every run, and no run could be resumed or compared any more."""
    assert (ORDER, CROP, MASK, BLOCK_SIZE) == (1, 2, 3, 4)
    assert int(key_of(0, ORDER, 0, 0)) == 11180471912522242435
    assert int(key_of(0, CROP, 0, 0)) == 15707275315813158840
    assert int(key_of(0, MASK, 7, 11)) == 4351718047590966544
    assert int(key_of(12345, BLOCK_SIZE, 3, 0)) == 3196503769493660405
    assert permutation(0, 0, 12).tolist() == [6, 7, 11, 9, 2, 5, 8, 1, 4, 0, 10, 3]
    assert permutation(0, 1, 12).tolist() == [4, 10, 3, 8, 11, 0, 9, 7, 1, 6, 2, 5]
    assert permutation(2**63 - 1, 5, 12).tolist() == [3, 9, 6, 2, 7, 4, 1, 0, 11, 8, 5, 10]
