"""Both mask samplers: what every mask must be, and the distributions that they are known to have."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time

import numba
import numpy as np
import pytest

from ijepa_ds.errors import UserError
from ijepa_ds.method import mask_draws
from ijepa_ds.method.mask_draws import ATTEMPTS, CORRECTIONS
from ijepa_ds.method.masks import MaskSampler, MultiblockSampler, ReferenceSampler, default_context_tokens
from ijepa_ds.random_streams import MASK, below, stream, uniform

# 4x4 is 32 px with patch 8, 6x6 is 96 with 16: the released code never ended there. 37x37 is DINOv2's 518 with 14.
GRIDS = [
    (2, 2),
    (3, 3),
    (4, 4),
    (6, 6),
    (8, 8),
    (16, 16),
    (28, 28),
    (37, 37),
    (2, 9),
    (9, 2),
    (1, 12),
    (5, 11),
    (14, 28),
    (3, 100),  # more columns than a word has bits
]
REFERENCE_GRIDS = [grid for grid in GRIDS if min(grid) >= 4]


def multiblock(grid: tuple[int, int], **more) -> MultiblockSampler:
    return MultiblockSampler(grid=grid, **{"seed": 0, "context_tokens": default_context_tokens(grid), **more})


def reference(grid: tuple[int, int], **more) -> ReferenceSampler:
    return ReferenceSampler(grid=grid, **{"seed": 0, "min_keep": min(10, grid[0] * grid[1] // 20), **more})


def assert_rectangle(tokens: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> None:
    """``tokens`` are all patches of a block of ``size`` within the grid, row by row."""
    top, left = divmod(int(tokens[0]), grid[1])
    assert top + size[0] <= grid[0] and left + size[1] <= grid[1]
    expected = [row * grid[1] + column for row in range(top, top + size[0]) for column in range(left, left + size[1])]
    assert tokens.tolist() == expected


def assert_valid(sampler: MaskSampler, step: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask of an image, after every promise about a single mask has been checked."""
    context, targets = sampler.draw(step, sample)
    size = sampler.block_sizes(step).target
    assert targets.shape == (sampler.num_targets, size[0] * size[1])
    for target in targets:
        assert_rectangle(target, sampler.grid, size)
    assert (np.diff(context) > 0).all()  # ascending, hence distinct
    assert context[0] >= 0 and context[-1] < sampler.grid[0] * sampler.grid[1]
    assert len(context) <= sampler.context_room
    if isinstance(sampler, MultiblockSampler):
        assert len(context) == sampler.context_tokens
        assert not np.isin(context, targets).any()
        rows, columns = context // sampler.grid[1], context % sampler.grid[1]
        assert np.ptp(rows) < sampler.block_sizes(step).context[0]
        assert np.ptp(columns) < sampler.block_sizes(step).context[1]
    else:
        assert len(context) > sampler.min_keep
    return context, targets


def chi_square_limit(degrees: int) -> float:
    """Five standard deviations above what a chi-square of equal shares has on average."""
    return degrees + 5 * np.sqrt(2 * degrees)


# ------------------------------------------------------------------------------------------- every mask


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_multiblock_masks_are_valid_on_every_grid(grid):
    sampler = multiblock(grid)
    for step in range(60):
        for sample in range(3):
            assert_valid(sampler, step, sample)


@pytest.mark.parametrize("grid", REFERENCE_GRIDS, ids=str)
def test_reference_masks_are_valid_on_every_grid(grid):
    sampler = reference(grid)
    for step in range(60):
        for sample in range(3):
            assert_valid(sampler, step, sample)


@pytest.mark.parametrize("num_targets", [1, 2, 9])
@pytest.mark.parametrize("make", [multiblock, reference])
def test_any_number_of_targets(make, num_targets):
    sampler = make((8, 10), num_targets=num_targets)
    for sample in range(100):
        _, targets = assert_valid(sampler, sample, sample)
        assert len(targets) == num_targets


@pytest.mark.parametrize("make", [multiblock, reference])
def test_a_mask_is_a_pure_function_of_seed_step_and_sample(make):
    def mask(seed: int, step: int, sample: int) -> list:
        context, targets = make((12, 12), seed=seed).draw(step, sample)
        return [context.tolist(), targets.tolist()]

    first = mask(1, 2, 3)
    mask(9, 9, 9)  # nothing is remembered
    assert mask(1, 2, 3) == first
    assert first not in (mask(2, 2, 3), mask(1, 3, 3), mask(1, 2, 4), mask(1, 3, 2))


@pytest.mark.parametrize("make", [multiblock, reference])
def test_block_sizes_are_shared_by_a_step_and_change_between_steps(make):
    sampler = make((16, 16))
    for step in range(5):
        assert len({sampler.draw(step, sample)[1].shape for sample in range(50)}) == 1
    assert len({sampler.block_sizes(step).target for step in range(300)}) >= 6
    assert sampler.block_sizes(3) == make((16, 16)).block_sizes(3)
    other = make((16, 16), seed=1)
    assert [sampler.block_sizes(step) for step in range(9)] != [other.block_sizes(step) for step in range(9)]


def test_targets_of_an_image_are_placed_independently():
    """Four blocks and their positions in 20,000 images: as uncorrelated as numbers of other images are."""
    sampler = multiblock((16, 16))
    corners = np.array([sampler.draw(step, 0)[1][:, 0] for step in range(20_000)])
    places = np.concatenate([corners // 16, corners % 16], axis=1)
    correlations = np.corrcoef(places.T) - np.eye(8)
    assert abs(correlations).max() < 0.04  # rejection and shared sizes leave a little


def test_masks_are_what_they_always_were():
    """Golden masks: whoever changes one changes every run."""
    context, targets = multiblock((16, 16), context_tokens=8).draw(3, 5)
    assert context.tolist() == [3, 6, 14, 50, 55, 59, 110, 159]
    assert (targets[:, 0].tolist(), targets[:, -1].tolist()) == ([129, 83, 165, 119], [216, 170, 252, 206])
    context, targets = reference((16, 16)).draw(3, 5)
    assert len(context) == 111
    assert (targets[:, 0].tolist(), targets[:, -1].tolist()) == ([82, 67, 118, 88], [199, 184, 235, 205])


@pytest.mark.parametrize(("grid", "digest"), [((8, 8), "c530ab58c5ee274d"), ((16, 16), "7f80acb88cb171fb")])
def test_reference_masks_without_corrections_are_what_they_always_were(grid, digest):
    """Of the code before it had corrections: 200 masks, and the counts of 40 groups."""
    sampler, found = reference(grid, seed=3, min_keep=8), hashlib.sha256()
    for step in range(40):
        for sample, part in itertools.product(range(5), range(2)):
            found.update(sampler.draw(step, sample)[part].tobytes())
        found.update(str(sampler.context_count(step, np.arange(32))).encode())
    assert found.hexdigest()[:16] == digest


def plainly_drawn(sampler: MultiblockSampler, step: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition of a multiblock mask in arrays of booleans, from the same random numbers in the same order."""
    key, numbers = np.uint64(stream(np.uint64(sampler.seed), MASK, step, sample)), itertools.count()
    (rows, columns), sizes = sampler.grid, sampler.block_sizes(step)

    def place(block: tuple[int, int]) -> np.ndarray:
        top, left = (below(key, next(numbers), side - b + 1) for side, b in zip(sampler.grid, block, strict=True))
        inside = np.zeros(sampler.grid, bool)
        inside[top : top + block[0], left : left + block[1]] = True
        return inside

    for attempt in itertools.count():
        distinct = sampler.num_targets - attempt // ATTEMPTS
        targets = [place(sizes.target) for _ in range(sampler.num_targets)]
        context = place(sizes.context)
        targets[max(distinct, 1) :] = [targets[0]] * (sampler.num_targets - max(distinct, 1))
        if distinct == 0:
            row, column = np.mgrid[:rows, :columns]
            targets = [(row >= rows - sizes.target[0]) & (column >= columns - sizes.target[1])] * sampler.num_targets
            context = (row < sizes.context[0]) & (column < sizes.context[1])
        free = np.flatnonzero(context & ~np.any(targets, axis=0))
        if len(free) >= sampler.context_tokens or distinct == 0:
            break
    tokens: list[int] = []
    for seen, patch in enumerate(free):
        if uniform(key, next(numbers)) * (len(free) - seen) < sampler.context_tokens - len(tokens):
            tokens.append(patch)
    return np.array(tokens), np.array([np.flatnonzero(target) for target in targets])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_multiblock_masks_are_their_plain_definition_bit_for_bit(grid):
    """At the usual budget, and at the largest that is accepted, where targets are laid over each other."""
    for budget, num_targets in itertools.product((default_context_tokens(grid), largest_budget(grid)), (1, 4)):
        sampler = multiblock(grid, num_targets=num_targets, context_tokens=budget)
        for step in range(5):
            for drawn, plain in zip(sampler.draw(step, 9), plainly_drawn(sampler, step, 9), strict=True):
                assert (drawn == plain).all()


def test_no_compiled_function_takes_another_as_an_argument():
    """numba's cache on disk loses such a function between processes: the next run's loading thread would die."""
    for make in (multiblock, reference):
        make((8, 8)).draw(0, 0)
    compiled = [value for value in vars(mask_draws).values() if isinstance(value, numba.core.dispatcher.Dispatcher)]
    arguments = [argument for function in compiled for signature in function.signatures for argument in signature]
    assert len(arguments) > 20
    assert not any(isinstance(argument, numba.types.Dispatcher) for argument in arguments)


# ------------------------------------------------------------------------------------------- multiblock


def test_multiblock_sizes_follow_scale_and_aspect_ratio():
    """Every block is within a rounding of the area and the shape that the paper asks for."""
    sampler = multiblock((64, 64))
    blocks = [sampler.block_sizes(step) for step in range(2_000)]
    height, width = np.array([block.target for block in blocks]).T
    share, ratio = height * width / 64**2, height / width
    assert (share > 0.15 - 0.01).all() and (share < 0.2 + 0.01).all()
    assert (ratio > 0.75 - 0.04).all() and (ratio < 1.5 + 0.08).all()
    assert np.mean(share) == pytest.approx(0.175, abs=0.001) and np.mean(ratio) == pytest.approx(1.125, abs=0.015)
    assert abs(np.corrcoef(share, ratio)[0, 1]) < 0.1  # independent, which they are not in the released code
    side = np.array([block.context for block in blocks])
    assert (side[:, 0] == side[:, 1]).all()
    assert side.min() == 59 and side.max() == 64  # 64 * sqrt(0.85)


def test_multiblock_uses_a_wide_image_as_a_square_one():
    """Shares of the area hold on other shapes, and the context block has the image's shape."""
    sampler = multiblock((14, 28))
    for step in range(200):
        sizes = sampler.block_sizes(step)
        assert 0.13 < sizes.target_tokens / (14 * 28) < 0.22
        assert sizes.context[1] - 2 * sizes.context[0] in (-1, 0, 1)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)], ids=str)
def test_multiblock_covers_the_image_symmetrically_up_to_its_border(grid):
    """Unlike the released code's, whose last row and column stay empty and whose context lies at the top."""
    num_images = 20_000
    contexts, targets = np.zeros(grid[0] * grid[1]), np.zeros(grid[0] * grid[1])
    sampler = multiblock(grid)
    for step in range(num_images):
        context, blocks = sampler.draw(step, step)
        contexts[context] += 1 / num_images
        targets[np.unique(blocks)] += 1 / num_images
    for coverage in (contexts.reshape(grid), targets.reshape(grid)):
        assert coverage == pytest.approx(coverage[::-1], abs=0.02)  # 5 standard deviations
        assert coverage == pytest.approx(coverage[:, ::-1], abs=0.02)
        assert coverage[-1].min() > 0.01 and coverage[:, -1].min() > 0.01
        assert coverage.min() > 0.01


def test_the_context_is_drawn_uniformly_from_the_free_patches():
    """With one target of one patch: all pairs of the 15 patches beside it are equally often the context."""
    sampler = MultiblockSampler(
        seed=0,
        grid=(4, 4),
        context_tokens=2,
        num_targets=1,
        target_scale=(1 / 16, 1 / 16),
        target_aspect_ratio=(1, 1),
        context_scale=(1, 1),
    )
    pairs = list(itertools.combinations(range(15), 2))
    counts = dict.fromkeys(pairs, 0)
    for sample in range(100 * len(pairs)):
        context, targets = sampler.draw(0, sample)
        free = [patch for patch in range(16) if patch != targets[0, 0]]
        counts[free.index(context[0]), free.index(context[1])] += 1
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < chi_square_limit(len(pairs) - 1)


def test_the_context_prefers_no_row_of_a_whole_image():
    """72 of the free patches of 16 x 16: each row gets its share of them."""
    sampler = multiblock((16, 16), context_scale=(1.0, 1.0))
    chosen, share = np.zeros(16), np.zeros(16)
    for step in range(3_000):
        context, targets = sampler.draw(step, step)
        free = np.setdiff1d(np.arange(256), targets)
        chosen += np.bincount(context // 16, minlength=16)
        share += np.bincount(free // 16, minlength=16) * 72 / len(free)
    assert chosen == pytest.approx(share, rel=0.03)


def test_the_budget_of_vith14_is_the_documented_72():
    assert default_context_tokens((16, 16)) == 72
    assert [default_context_tokens(grid) for grid in [(1, 1), (2, 2), (8, 8), (28, 28)]] == [1, 1, 18, 220]
    assert multiblock((16, 16)).context_count(5, np.arange(3)) == 72


def largest_budget(grid: tuple[int, int]) -> int:
    """The largest K that is not refused."""
    accepted, refused = 1, grid[0] * grid[1]
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        try:
            accepted = multiblock(grid, context_tokens=middle).context_tokens
        except UserError:
            refused = middle
    return accepted


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (6, 6), (3, 8), (16, 16)], ids=str)
def test_a_budget_that_hardly_any_draw_leaves_still_ends_in_a_valid_mask(grid):
    """At the largest K that is accepted nearly every draw is rejected, and targets are laid over each other."""
    sampler = multiblock(grid, context_tokens=largest_budget(grid))
    start, coinciding = time.monotonic(), 0
    for step in range(200):
        _, targets = assert_valid(sampler, step, 0)
        coinciding += len(np.unique(targets[:, 0])) < 4
    assert coinciding > 20  # the last resort was taken, and
    assert time.monotonic() - start < 20  # it ends


def test_the_same_budget_is_refused_with_its_numbers_one_patch_above():
    budget = largest_budget((6, 6))
    with pytest.raises(UserError) as refusal:
        multiblock((6, 6), context_tokens=budget + 1)
    message = str(refusal.value)
    assert f"masks.context_tokens = {budget + 1}" in message and "6 x 6 patches" in message
    assert f"at most {budget} patches" in message and "lower masks.context_tokens" in message


def test_a_budget_beyond_the_image_is_refused():
    with pytest.raises(UserError, match=r"masks.context_tokens = 65 cannot be drawn on a grid of 8 x 8"):
        multiblock((8, 8), context_tokens=65)


def test_the_largest_target_is_known_before_any_is_drawn():
    for make, grid in itertools.product((multiblock, reference), [(6, 6), (16, 16), (14, 28)]):
        sampler = make(grid)
        counts = {sampler.block_sizes(step).target_tokens for step in range(5_000)}
        assert max(counts) <= sampler.max_target_tokens() <= max(counts) + max(grid)
        listed = sampler.target_token_counts()
        assert counts <= set(listed) and listed == sorted(set(listed), reverse=True)


# ------------------------------------------------------------------------------------------- reference


@pytest.fixture(scope="module")
def released() -> tuple[np.ndarray, np.ndarray]:
    """Number of context tokens, and whether each patch is context or target, of 20,000 images at 16 x 16."""
    sampler, counts, used = reference((16, 16)), [], np.zeros(256, bool)
    for image in range(20_000):
        context, targets = sampler.draw(image, image)
        counts.append(len(context))
        used[context] = True
        used[targets] = True
    return np.array(counts), used.reshape(16, 16)


def test_reference_context_has_the_released_codes_size(released):
    """Measured by running that code: mean 110.2, std 18.1, 48 to 171, quantiles of 20,000 images."""
    counts, _ = released
    assert counts.mean() == pytest.approx(110.19, rel=0.01)
    assert counts.std() == pytest.approx(18.14, rel=0.03)
    assert np.quantile(counts, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]) == pytest.approx(
        [68, 80, 98, 110, 123, 140, 151], abs=2
    )


def test_reference_never_uses_the_last_row_and_column(released):
    _, used = released
    assert used[:15, :15].all() and not used[15].any() and not used[:, 15].any()


def test_reference_blocks_have_the_released_codes_shapes():
    sampler = reference((16, 16))
    shapes = [sampler.block_sizes(step).target for step in range(20_000)]
    measured = {(5, 7): 0.048, (6, 6): 0.017, (6, 7): 0.278, (7, 6): 0.287, (8, 6): 0.296, (9, 6): 0.073}
    assert set(shapes) == set(measured)
    for shape, share in measured.items():
        assert shapes.count(shape) / 20_000 == pytest.approx(share, abs=0.012)
    assert {sampler.block_sizes(step).context for step in range(1_000)} == {(15, 15)}


def test_reference_context_is_cut_as_128_images_a_gpu_cut_it():
    sampler = reference((16, 16))
    kept = [sampler.context_count(step, np.arange(step * 128, step * 128 + 128)) for step in range(3_000)]
    assert np.mean(kept) == pytest.approx(68.3, abs=1)


@pytest.mark.parametrize(("group", "kept"), [(1, 110.0), (4, 92.5), (16, 81.0), (64, 72.1)])
def test_reference_context_shrinks_with_the_truncation_group(group, kept):
    """A group that shares its block sizes, as a step does, is a little more alike than the measured ones."""
    sampler = reference((16, 16))
    counts = [sampler.context_count(step, np.arange(group)) for step in range(3_000)]
    assert np.mean(counts) == pytest.approx(kept, abs=1.5)


def test_reference_group_keeps_its_smallest_context():
    sampler = reference((12, 12))
    for step in range(20):
        group = np.arange(step, step + 9)
        assert sampler.context_count(step, group) == min(len(sampler.draw(step, sample)[0]) for sample in group)


def test_reference_truncation_empties_the_lower_rows():
    """Grid rows 12, 13, 14 lose 79, 92 and 98 % of their context, rows 0 to 2 nothing."""
    sampler = reference((16, 16))
    before, after = np.zeros(16), np.zeros(16)
    for step in range(150):
        group = np.arange(128)
        kept = sampler.context_count(step, group)
        for sample in group:
            rows = sampler.draw(step, sample)[0] // 16
            before += np.bincount(rows, minlength=16)
            after += np.bincount(rows[:kept], minlength=16)
    lost = 1 - after[:15] / before[:15]
    assert lost[:3].max() < 0.01
    assert lost[12:] == pytest.approx([0.79, 0.92, 0.98], abs=0.04)
    assert (np.diff(lost[3:]) > 0).all()


def test_reference_context_avoids_the_targets_unless_patience_ran_out():
    sampler, meeting = reference((16, 16)), 0
    for image in range(500):
        context, targets = sampler.draw(image, image)
        meeting += np.isin(context, targets).any()
    assert meeting == 0  # at 16 x 16 there is always room
    crowded = ReferenceSampler(seed=0, grid=(6, 6), min_keep=8, num_targets=9, target_scale=(0.3, 0.3))
    met = [np.isin(*crowded.draw(image, image)).any() for image in range(500)]
    assert np.mean(met) > 0.2  # constraints were dropped, and the draw ended


@pytest.mark.parametrize(("grid", "more"), [((4, 4), {"min_keep": 10}), ((2, 2), {}), ((6, 6), {"min_keep": 30})])
def test_a_grid_on_which_the_released_code_never_ends_is_refused(grid, more):
    with pytest.raises(UserError) as refusal:
        reference(grid, **more)
    message = str(refusal.value)
    assert f"grid of {grid[0]} x {grid[1]} patches" in message and "masks.min_keep" in message
    assert "multiblock" in message


# ------------------------------------------------------------------------------------------------- a share of a block


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_fixed_number_of_each_block_is_kept_and_the_context_stays(share):
    whole = MultiblockSampler(seed=3, grid=(8, 8), context_tokens=18)
    sampler = dataclasses.replace(whole, predict_share=share)
    counts = np.zeros(64)
    for step in range(200):
        context, targets = sampler.draw(step, 7)
        every_context, every = whole.draw(step, 7)
        assert (context == every_context).all()
        assert targets.shape == (4, max(1, round(share * every.shape[1])))
        assert targets.shape[1] == sampler.block_sizes(step).target_tokens
        for kept, block in zip(targets, every, strict=True):
            assert (np.diff(kept) > 0).all() and set(kept) <= set(block)
            counts[np.searchsorted(block, kept)] += 1
    assert sampler.max_target_tokens() == max(1, round(share * whole.max_target_tokens()))
    smallest = min(s.target_tokens for s in map(whole.block_sizes, range(200)))
    first, last = counts[: smallest // 2].mean(), counts[smallest // 2 : smallest].mean()
    assert abs(first - last) < 0.15 * (first + last)  # no place of a block is preferred


# ------------------------------------------------------------------------------------------- reference, corrected

MORE = [(name,) for name in CORRECTIONS] + [CORRECTIONS]


def corrected(*names: str, grid: tuple[int, int] = (16, 16), **more) -> ReferenceSampler:
    return reference(grid, corrections=frozenset(names), **more)


def coverage(sampler: MaskSampler, num_images: int = 1_000) -> tuple[np.ndarray, np.ndarray]:
    """How often each patch is context, and target, of the grid's shape."""
    counts = np.zeros((2, sampler.grid[0] * sampler.grid[1]))
    for image in range(num_images):
        for of_part, tokens in zip(counts, sampler.draw(image, image), strict=True):
            of_part[np.unique(tokens)] += 1 / num_images
    context, targets = counts.reshape(2, *sampler.grid)
    return context, targets


@pytest.mark.parametrize("names", MORE, ids="+".join)
def test_a_correction_keeps_what_every_mask_must_be(names):
    sampler = corrected(*names, grid=(8, 8))
    for step in range(20):
        target, group = sampler.block_sizes(step).target, np.arange(step, step + 9)
        drawn = [sampler.draw(step, sample) for sample in group]
        assert sampler.context_count(step, group) == min(len(context) for context, _ in drawn)
        for context, targets in drawn:
            assert (
                len(np.unique(context)) == len(context) > sampler.min_keep and 0 <= context.min() < context.max() < 64
            )
            assert not np.isin(context, targets).any()
            for block in targets:
                assert_rectangle(block, (8, 8), target)
        again = corrected(*names, grid=(8, 8)).draw(step, step)
        assert all((one == other).all() for one, other in zip(again, drawn[0], strict=True))
    counts = {sampler.block_sizes(step).target_tokens for step in range(2_000)}
    assert counts <= set(sampler.target_token_counts())


def test_a_random_cut_takes_the_same_from_every_row():
    """The contexts are the released code's; what a cut leaves of them is a random part, not the first rows."""
    sampler, plain = corrected("random_cut"), reference((16, 16))
    before, after, prefixes = np.zeros(16), np.zeros(16), 0
    for step in range(60):
        kept = sampler.context_count(step, np.arange(64))
        assert kept == plain.context_count(step, np.arange(64))
        for sample in range(64):
            (context, targets), (ordered, same_targets) = sampler.draw(step, sample), plain.draw(step, sample)
            assert (np.sort(context) == ordered).all() and (targets == same_targets).all()
            before += np.bincount(context // 16, minlength=16)
            after += np.bincount(context[:kept] // 16, minlength=16)
            prefixes += len(context) > kept and (np.sort(context[:kept]) == ordered[:kept]).all()
    lost = 1 - after[:15] / before[:15]
    assert prefixes == 0
    assert lost.mean() > 0.25 and lost == pytest.approx(np.full(15, lost.mean()), abs=0.04)


def test_a_random_cut_takes_every_patch_equally_often():
    """The first of the random order, in 4,000 contexts of 19 patches or more: a patch's count deviates by 0.8."""
    sampler, surplus = corrected("random_cut", grid=(6, 6), num_targets=1), np.zeros(36)
    for step in range(4_000):
        context, _ = sampler.draw(step, 0)
        assert len(context) >= 19
        surplus[context[0]] += 1 / len(context)
        surplus[context] -= 1 / len(context) ** 2
    assert abs(surplus).max() < 4


def test_a_free_corner_lets_the_context_block_be_anywhere():
    sampler, plain = corrected("free_corner"), reference((16, 16))
    assert {sampler.block_sizes(step).context for step in range(300)} == {(15, 15), (16, 16)}
    context, targets = coverage(sampler)
    assert context[15].min() > 0.1 and context[:, 15].min() > 0.1
    assert not targets[15].any() and not targets[:, 15].any()
    for step in range(50):
        assert (sampler.draw(step, 7)[1] == plain.draw(step, 7)[1]).all()
    small = corrected("free_corner", context_scale=(0.25, 0.25), min_keep=0, num_targets=1)  # a block of 8 x 8
    rows = [small.draw(step, 0)[0] // 16 for step in range(300)]
    assert {int(row.min()) for row in rows} >= set(range(9)) and all(np.ptp(row) < 8 for row in rows)


def test_the_last_row_lies_in_target_blocks_and_never_in_a_context():
    sampler = corrected("last_row")
    assert {sampler.block_sizes(step).context for step in range(300)} == {(15, 15)}
    assert [sampler.block_sizes(step) for step in range(50)] == [reference((16, 16)).block_sizes(s) for s in range(50)]
    context, targets = coverage(sampler)
    assert targets[15].min() > 0 and targets[:, 15].min() > 0
    assert not context[15].any() and not context[:, 15].any()
    assert targets == pytest.approx(targets[::-1], abs=0.08)  # 5 standard deviations


def test_two_numbers_make_scale_and_aspect_ratio_independent():
    shapes = {}
    for name, sampler in (("one", reference((64, 64))), ("two", corrected("two_numbers", grid=(64, 64)))):
        blocks = np.array([sampler.block_sizes(step).target for step in range(2_000)])
        shapes[name] = np.corrcoef(blocks.prod(1), blocks[:, 0] / blocks[:, 1])[0, 1]
        assert blocks.prod(1).min() / 64**2 > 0.15 - 0.01 and blocks.prod(1).max() / 64**2 < 0.2 + 0.01
    assert shapes["one"] > 0.95 and abs(shapes["two"]) < 0.1
    sampler = corrected("two_numbers")
    assert len({sampler.block_sizes(step).target for step in range(2_000)}) == 12  # six, as released


def test_all_corrections_together_leave_the_count_of_context_tokens_alone():
    """Sizes and coverage are multiblock's; the number of tokens is the smallest of a group's, not a fixed one."""
    sampler, wanted = corrected(*CORRECTIONS), multiblock((16, 16))
    sizes = [np.array([[*b.target, *b.context] for b in map(s.block_sizes, range(2_000))]) for s in (sampler, wanted)]
    assert sizes[0].mean(0) == pytest.approx(sizes[1].mean(0), abs=0.15)
    context, targets = coverage(sampler, 2_000)
    for covered in (context, targets):
        assert covered == pytest.approx(covered[::-1], abs=0.06) and covered == pytest.approx(
            covered[:, ::-1], abs=0.06
        )
        assert covered.min() > 0.005
    assert targets == pytest.approx(coverage(wanted, 2_000)[1], abs=0.06)
    assert len({sampler.context_count(step, np.arange(128)) for step in range(50)}) > 5
