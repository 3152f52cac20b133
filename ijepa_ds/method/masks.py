"""Mask samplers: which patches the context encoder sees and which four blocks it must predict.

Two samplers (Assran et al., arXiv 2301.08243, section 3 and appendix A.1):

* ``multiblock`` (default): the paper's definition. Scale and aspect ratio are independent, bounds inclusive. The block
  sizes are shared by the whole global batch of a step, positions are each image's own, and every image keeps exactly
  ``context_tokens`` patches, drawn uniformly from its context block. No spatial bias, equal shapes on every rank.
* ``reference``: the distribution of the released code with its peculiarities, for comparison: one random number for
  scale and aspect ratio, the last row and column never used, and the context cut, in row order, to the smallest of a
  group of ``truncation_group`` images (there: the images of one GPU). Each peculiarity can be corrected alone
  (:data:`CORRECTIONS`), to measure what it does.

Of a target block all patches are predicted, or with ``predict_share`` below 1 a fixed number of them, all sets equally
likely (CAPI, Darcet et al., arXiv 2502.08769, predicts 5 % of what it masks): fewer tokens in the predictor, in shapes
that do not depend on the draw.

A mask is a pure function of (seed, step, sample). Patch n = row * columns + column.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, G images of a truncation group.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from ijepa_ds.errors import UserError
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


@dataclass(frozen=True)
class BlockSizes:
    """Rows and columns, in patches, of the blocks of one step."""

    target: tuple[int, int]
    context: tuple[int, int]
    predict_share: float = 1.0  # of a target block

    @property
    def target_tokens(self) -> int:
        """The patches of a target block that are predicted, T."""
        return max(1, round(self.target[0] * self.target[1] * self.predict_share))


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
def _smallest_context(seed, step, samples, blocks, least_tokens, num_targets, corrected):
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


@dataclass(frozen=True, kw_only=True)
class _Sampler(ABC):
    """What both samplers share. ``grid`` is (rows, columns) of patches."""

    seed: int
    grid: tuple[int, int]
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    predict_share: float = 1.0

    @property
    @abstractmethod
    def sizes_of(self) -> Callable[..., Sizes]:
        """Rows and columns of target and context blocks from the three numbers of a step; compiled."""

    @property
    @abstractmethod
    def draw_image(self) -> Callable[..., int]:
        """One image's mask, which is written where it is told; compiled."""

    @property
    @abstractmethod
    def least_tokens(self) -> int:
        """The context tokens that a draw has at least."""

    @property
    @abstractmethod
    def context_room(self) -> int:
        """The most context tokens that an image can have."""

    @property
    def geometry(self) -> tuple:
        """The last arguments of ``sizes_of``."""
        return self.grid, self.target_scale, self.target_aspect_ratio, self.context_scale

    def block_sizes(self, step: int) -> BlockSizes:
        """The sizes that the whole global batch of ``step`` shares: equal shapes on every rank."""
        sizes = self.sizes_of(*size_numbers(np.uint64(self.seed), step), *self.geometry)
        return BlockSizes(sizes[:2], sizes[2:], self.predict_share)

    def max_target_tokens(self) -> int:
        """The largest T of any step."""
        return self.target_token_counts()[0]

    def target_token_counts(self) -> list[int]:
        """Every T that a step can have, the largest first."""
        return sorted({sizes.target_tokens for sizes in self._possible_sizes()}, reverse=True)

    def block_room(self) -> int:
        """The patches of the largest target block of any step, predicted or not."""
        return max(sizes.target[0] * sizes.target[1] for sizes in self._possible_sizes())

    def draw(self, step: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Context int32 [K] (of ``reference``: not truncated) and targets int32 [M, T] of one image, its first ones."""
        sizes = self.block_sizes(step)
        tokens = np.empty(self.context_room, np.int32)
        targets = np.empty((self.num_targets, sizes.target[0] * sizes.target[1]), np.int32)
        blocks = (self.grid, sizes.target, sizes.context)
        kept = self.draw_image(np.uint64(self.seed), step, sample, *blocks, self.least_tokens, tokens, targets)
        if self.predict_share < 1:
            shape = self.num_targets, sizes.target_tokens
            thin(np.uint64(self.seed), step, sample, targets, shape[1])
            return tokens[:kept], targets.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
        return tokens[:kept], targets

    def _possible_sizes(self) -> set[BlockSizes]:
        """Every size that a step can have, scanned finely enough for grids of thousands of patches."""
        fine, coarse = [i / 400 for i in range(401)], [i / 40 for i in range(41)]
        targets = {self.sizes_of(a, b, b, *self.geometry)[:2] for a in fine for b in coarse}
        targets |= {self.sizes_of(b, a, a, *self.geometry)[:2] for a in fine for b in coarse}
        contexts = {self.sizes_of(0.0, a, a, *self.geometry)[2:] for a in fine}
        return {BlockSizes(target, context, self.predict_share) for target in targets for context in contexts}


@dataclass(frozen=True, kw_only=True)
class MultiblockSampler(_Sampler):
    """The paper's masks; see the module's text."""

    context_tokens: int
    truncation_group: ClassVar[int] = 1  # no image's context depends on another's

    def __post_init__(self) -> None:
        worst = min(self._possible_sizes(), key=self._room)
        if self.context_tokens > self._room(worst):
            raise UserError(
                f"masks.context_tokens = {self.context_tokens} cannot be drawn on a grid of {_by(self.grid)} patches: "
                f"a context block of {_by(worst.context)} leaves at most {self._room(worst)} patches beside a target "
                f"block of {_by(worst.target)}; lower masks.context_tokens or masks.target_scale"
            )

    @property
    def sizes_of(self) -> Callable[..., Sizes]:
        """The paper's."""
        return multiblock_sizes

    @property
    def draw_image(self) -> Callable[..., int]:
        """The paper's, too."""
        return draw_multiblock

    @property
    def least_tokens(self) -> int:
        """K."""
        return self.context_tokens

    @property
    def context_room(self) -> int:
        """K, too."""
        return self.context_tokens

    def context_count(self, step: int, group: np.ndarray) -> int:
        """Context tokens of every image of a batch: K, whatever the batch."""
        return self.context_tokens

    def _room(self, sizes: BlockSizes) -> int:
        """The most context patches that any draw leaves: the blocks in opposite corners."""
        overlap = [max(0, t + c - side) for t, c, side in zip(sizes.target, sizes.context, self.grid, strict=True)]
        return sizes.context[0] * sizes.context[1] - overlap[0] * overlap[1]


@dataclass(frozen=True, kw_only=True)
class ReferenceSampler(_Sampler):
    """The released code's masks; see the module's text. Kept for comparison, with all defects but ``corrections``."""

    min_keep: int = 10
    truncation_group: int = 128
    corrections: frozenset[str] = frozenset()  # of CORRECTIONS

    def __post_init__(self) -> None:
        sizes = self._possible_sizes()
        for name, blocks in (("target", {s.target for s in sizes}), ("context", {s.context for s in sizes})):
            smallest = min(blocks, key=lambda block: block[0] * block[1])
            if smallest[0] * smallest[1] < max(1, self.least_tokens):
                raise UserError(
                    f"the reference sampler never ends on a grid of {_by(self.grid)} patches: a {name} block of "
                    f"{_by(smallest)} does not hold more than masks.min_keep = {self.min_keep} patches; lower "
                    "masks.min_keep or set masks.sampler to multiblock"
                )

    @property
    def sizes_of(self) -> Callable[..., Sizes]:
        """The released code's, corrected where that is asked for."""
        return reference_functions(self.corrections)[0]

    @property
    def draw_image(self) -> Callable[..., int]:
        """The released code's, likewise."""
        return reference_functions(self.corrections)[1]

    @property
    def least_tokens(self) -> int:
        """More than ``min_keep``, as in the released code."""
        return self.min_keep + 1

    @property
    def context_room(self) -> int:
        """All patches."""
        return self.grid[0] * self.grid[1]

    def context_count(self, step: int, group: np.ndarray) -> int:
        """Context tokens that every image of a truncation group keeps: the group's minimum. ``group``: samples [G]."""
        sizes = self.block_sizes(step)
        blocks = (self.grid, sizes.target, sizes.context)
        corrected = corrections_of_draws(self.corrections)
        return _smallest_context(
            np.uint64(self.seed), step, group, blocks, self.least_tokens, self.num_targets, corrected
        )


MaskSampler = MultiblockSampler | ReferenceSampler


def default_context_tokens(grid: tuple[int, int]) -> int:
    """The context budget K: 72 of the 256 patches of ViT-H/14 at 224, in proportion on other grids.

    98.4 % of all draws hold as many. Close to the 68.3 that the released code keeps at 128 images a GPU, so as costly.
    """
    return max(1, round(grid[0] * grid[1] * 72 / 256))


def _by(block: tuple[int, int]) -> str:
    return f"{block[0]} x {block[1]}"
