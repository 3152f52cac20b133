"""The compiled functions that draw a mask, a pure one of (seed, step, sample); what they are for: ``masks.py``.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, G images of a truncation group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from ijepa_ds.random_streams import BLOCK_SIZE, GOLDEN, MASK, PREDICTED, below, stream, uniform

Sizes = tuple[int, int, int, int]  # rows and columns of target blocks, of context blocks

# Nothing here is cached by numba on disk: it would not notice a change of random_streams, which is compiled in.

_NONE, _ONE, _ALL = np.uint64(0), np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)

# What can be corrected of `reference`, each alone or several together. With all of them it differs from `multiblock` in
# the number of context tokens alone: the smallest of a group, not a fixed one.
CORRECTIONS = (
    "random_cut",  # a context is cut to a random part of its patches, all parts equally likely, not to the first rows
    "free_corner",  # the context block has the size that was drawn, up to the whole grid, and lies anywhere in it
    "last_row",  # target blocks lie on the last row and column, too
    "two_numbers",  # scale and aspect ratio of the target blocks are independent
)

# After this many rejected draws one more target block is laid over the first one, so that a draw always ends.
ATTEMPTS = 100
_REFERENCE_PATIENCE = 20  # the released code drops one constraint after so many tries


def _count_ones(context, value):
    """The set bits of an integer, as one instruction."""
    return value(value), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


def _trailing_zeros(context, value):
    """The place of an integer's lowest set bit, of which there must be one; one instruction."""
    return value(value), lambda context, builder, signature, arguments: builder.cttz(arguments[0], ir.IntType(1)(1))


count_ones: Callable[..., int] = intrinsic(_count_ones)
trailing_zeros: Callable[..., int] = intrinsic(_trailing_zeros)


@njit
def _between(bounds, number):
    return bounds[0] + number * (bounds[1] - bounds[0])


@njit
def _clip(length, side):
    return max(1, min(round(length), side))


@njit
def multiblock_sizes(scale, aspect, context, grid, target_scale, aspect_ratio, context_scale):
    """Target rows and columns, context rows and columns from three numbers in [0, 1]."""
    area = grid[0] * grid[1] * _between(target_scale, scale)
    ratio = _between(aspect_ratio, aspect)  # height over width
    # The paper's context block is square on a square image; on any other it keeps the image's shape.
    side = math.sqrt(_between(context_scale, context))
    target = _clip(math.sqrt(area * ratio), grid[0]), _clip(math.sqrt(area / ratio), grid[1])
    return target[0], target[1], _clip(grid[0] * side, grid[0]), _clip(grid[1] * side, grid[1])


@njit
def _reference_sizes(scale, ratio, context, grid, target_scale, context_scale, reach):
    """The released code's sizes from two numbers in [0, 1] and the target blocks' height over width.

    Blocks are strictly smaller than the grid, except where ``reach``, of target and context blocks, says otherwise.
    """
    target_area = int(grid[0] * grid[1] * _between(target_scale, scale))
    context_area = int(grid[0] * grid[1] * _between(context_scale, context))
    return (
        min(round(math.sqrt(target_area * ratio)), grid[0] - 1 + reach[0]),
        min(round(math.sqrt(target_area / ratio)), grid[1] - 1 + reach[0]),
        min(round(math.sqrt(context_area)), grid[0] - 1 + reach[1]),
        min(round(math.sqrt(context_area)), grid[1] - 1 + reach[1]),
    )


@njit
def size_numbers(seed, step):
    """The three numbers in [0, 1) that decide the block sizes of a step."""
    key = stream(seed, BLOCK_SIZE, step, 0)
    return uniform(key, 0), uniform(key, 1), uniform(key, 2)


@njit
def seed_of_context(seed, context):
    """The seed by which an image's further contexts are drawn; the first has the run's own."""
    return np.uint64(seed) + np.uint64(context) * GOLDEN


@njit
def _place(key, counter, block, grid, inclusive):
    """Top left corner of a block, uniform over its positions; ``inclusive`` 0 leaves out the last row and column."""
    top = below(key, counter, grid[0] - block[0] + inclusive)
    left = below(key, counter + 1, grid[1] - block[1] + inclusive)
    return top, left


@njit
def _write_block(top, left, block, columns, tokens):
    token = 0
    for row in range(top, top + block[0]):
        for column in range(left, left + block[1]):
            tokens[token] = row * columns + column
            token += 1


@njit
def _columns(left, width, word):
    """The bits of the columns [left, left + width) in a row's ``word``-th 64 columns."""
    low, high = max(left - 64 * word, 0), min(left + width - 64 * word, 64)
    if high <= low:
        return _NONE
    return (_ALL >> np.uint64(64 - high + low)) << np.uint64(low)


@njit
def _show(top, left, block, visible):
    """Make the patches of a block visible, and no others."""
    visible[:] = _NONE
    for word in range(visible.shape[1]):
        bits = _columns(left, block[1], word)
        for row in range(top, top + block[0]):
            visible[row, word] = bits


@njit
def _hide(top, left, block, visible):
    """Make the patches of a block invisible."""
    for word in range(visible.shape[1]):
        bits = ~_columns(left, block[1], word)
        for row in range(top, top + block[0]):
            visible[row, word] &= bits


@njit
def _count(visible):
    count = 0
    for row in range(visible.shape[0]):
        for word in range(visible.shape[1]):
            count += np.int64(count_ones(visible[row, word]))
    return count


@njit
def _select(key, counter, visible, left, columns, tokens):
    """Selection sampling (Knuth, Algorithm S): K of ``left`` visible patches, all sets equally likely, ascending."""
    missing, kept = len(tokens), 0
    for row in range(visible.shape[0]):
        for word in range(visible.shape[1]):
            bits = visible[row, word]
            while bits != _NONE:
                tokens[kept] = row * columns + 64 * word + np.int64(trailing_zeros(bits))
                taken = np.int64(below(key, counter, left) < missing)  # a number: a branch would be guessed wrongly
                kept, missing = kept + taken, missing - taken
                if missing == 0:
                    return
                bits &= bits - _ONE
                counter += 1
                left -= 1


@njit
def _write_targets(block, columns, targets):
    """Fill the target blocks, whose first patches are there."""
    first, corner = targets[0], targets[0, 0]
    for row in range(block[0]):
        for column in range(block[1]):
            first[row * block[1] + column] = corner + row * columns + column
    for m in range(1, len(targets)):
        shift = targets[m, 0] - corner
        for token in range(len(first)):
            targets[m, token] = first[token] + shift


@njit
def draw_multiblock(seed, step, sample, grid, target, context, context_tokens, tokens, targets):
    """Fill ``tokens`` int32 [K] (ascending) and ``targets`` int32 [M, T] of one image; returns K.

    Blocks are drawn anew until at least ``context_tokens`` patches of the context block lie outside all targets.
    """
    key = stream(seed, MASK, step, sample)
    visible = np.empty((grid[0], (grid[1] + 63) // 64), np.uint64)  # a bit a patch: in the context, in no target block
    counter = 0
    distinct = len(targets)
    attempt = 0
    while True:
        if distinct > 0:
            top, left = _place(key, counter + 2 * len(targets), context, grid, 1)
            _show(top, left, context, visible)
            for m in range(distinct):
                top, left = _place(key, counter + 2 * m, target, grid, 1)
                _hide(top, left, target, visible)
                targets[m, 0] = top * grid[1] + left
        else:  # last resort, valid wherever a valid draw exists: opposite corners
            _show(0, 0, context, visible)
            _hide(grid[0] - target[0], grid[1] - target[1], target, visible)
            targets[0, 0] = (grid[0] - target[0]) * grid[1] + grid[1] - target[1]
        counter += 2 * len(targets) + 2
        free = _count(visible)
        if free >= context_tokens or distinct == 0:
            break
        attempt += 1
        if attempt % ATTEMPTS == 0:
            distinct -= 1
    for m in range(distinct, len(targets)):  # laid over the first
        targets[m, 0] = targets[0, 0]
    _write_targets(target, grid[1], targets)
    _select(key, counter, visible, free, grid[1], tokens[:context_tokens])
    return context_tokens


@njit
def _shuffle(key, counter, tokens):
    """Bring tokens [K] into a random order, all equally likely (Durstenfeld)."""
    for last in range(len(tokens) - 1, 0, -1):
        other = below(key, counter, last + 1)
        tokens[last], tokens[other] = tokens[other], tokens[last]
        counter += 1


@njit
def _draw_reference(seed, step, sample, blocks, least_tokens, tokens, targets, corrected):
    """Fill ``tokens`` int32 [N] and ``targets`` int32 [M, T] as the released code draws them, before the truncation.

    Returns the number of context tokens, ``least_tokens`` or more. Target blocks may overlap; the context block must
    not meet them, but after 20 failed draws in a row one target block (from the last) is no longer respected.

    ``blocks``: rows and columns of grid, target and context. ``corrected``: whether target and context blocks may lie
    on the last row and column, and whether tokens come in a random order, of which any first part is a random one.
    """
    grid, target, context = blocks
    target_reach, context_reach, random_cut = corrected
    key = stream(seed, MASK, step, sample)
    num_targets = targets.shape[0]
    blocked = np.zeros((num_targets, grid[0], grid[1]), np.bool_)
    counter = 0
    for m in range(num_targets):
        top, left = _place(key, counter, target, grid, target_reach)
        counter += 2
        blocked[m, top : top + target[0], left : left + target[1]] = True
        _write_block(top, left, target, grid[1], targets[m])
    respected = num_targets
    patience = _REFERENCE_PATIENCE
    while True:
        top, left = _place(key, counter, context, grid, context_reach)
        counter += 2
        kept = 0
        for row in range(top, top + context[0]):
            for column in range(left, left + context[1]):
                hidden = False
                for m in range(respected):
                    hidden = hidden or blocked[m, row, column]
                if not hidden:
                    tokens[kept] = row * grid[1] + column
                    kept += 1
        if kept >= least_tokens:
            break
        patience -= 1
        if patience == 0:
            respected = max(0, respected - 1)
            patience = _REFERENCE_PATIENCE
    if random_cut:
        _shuffle(key, counter, tokens[:kept])
    return kept


@njit
def smallest_context(seed, step, samples, blocks, least_tokens, num_targets, corrected):
    grid, target, _ = blocks
    tokens = np.empty(grid[0] * grid[1], np.int32)
    targets = np.empty((num_targets, target[0] * target[1]), np.int32)
    smallest = grid[0] * grid[1]
    for sample in samples:
        kept = _draw_reference(seed, step, sample, blocks, least_tokens, tokens, targets, corrected)
        smallest = min(smallest, kept)
    return smallest


def corrections_of_draws(corrections: frozenset[str]) -> tuple[bool, bool, bool]:
    """What :func:`_draw_reference` is told of some of :data:`CORRECTIONS`."""
    return "last_row" in corrections, "free_corner" in corrections, "random_cut" in corrections


@functools.cache
def reference_functions(corrections: frozenset[str]) -> tuple[Callable[..., Sizes], Callable[..., int]]:
    """``sizes_of`` and ``draw_image`` of the released code with some of :data:`CORRECTIONS`, which are compiled in."""
    corrected, two_numbers = corrections_of_draws(corrections), "two_numbers" in corrections
    reach = corrected[:2]

    @njit
    def sizes_of(scale, context, aspect, grid, target_scale, aspect_ratio, context_scale):
        ratio = _between(aspect_ratio, aspect if two_numbers else scale)
        return _reference_sizes(scale, ratio, context, grid, target_scale, context_scale, reach)

    @njit
    def draw_image(seed, step, sample, grid, target, context, least_tokens, tokens, targets):
        blocks = (grid, target, context)
        return _draw_reference(seed, step, sample, blocks, least_tokens, tokens, targets, corrected)

    return sizes_of, draw_image


@njit
def thin(seed, step, sample, targets, count):
    """Keep ``count`` of the patches of each target block [M, T], ascending: the first M * count places then hold them.

    Selection sampling, as in :func:`_select`, block by block.
    """
    key, places, counter = stream(seed, PREDICTED, step, sample), targets.reshape(-1), 0
    for m in range(targets.shape[0]):
        kept = 0
        for token in range(targets.shape[1]):
            if below(key, counter, targets.shape[1] - token) < count - kept:
                places[m * count + kept] = targets[m, token]
                kept += 1
            counter += 1
