"""Mask samplers: which patches the context encoder sees and which four blocks it must predict.

Two samplers (Assran et al., arXiv 2301.08243, section 3 and appendix A.1):

* ``multiblock`` (default): the paper's definition. Scale and aspect ratio are independent, bounds inclusive. The block
  sizes are shared by the whole global batch of a step, positions are each image's own, and every image keeps exactly
  ``context_tokens`` patches, drawn uniformly from its context block. No spatial bias, equal shapes on every rank.
* ``reference``: the distribution of the released code with its peculiarities, for comparison: one random number for
  scale and aspect ratio, the last row and column never used, and the context cut, in row order, to the smallest of a
  group of ``truncation_group`` images (there: the images of one GPU).

A mask is a pure function of (seed, step, sample). Patch n = row * columns + column.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, G images of a truncation group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from ijepa_ds.errors import UserError
from ijepa_ds.random_streams import BLOCK_SIZE, MASK, below, stream, uniform

# After this many rejected draws one more target block is laid over the first one, so that a draw always ends.
ATTEMPTS = 100
_REFERENCE_PATIENCE = 20  # the released code drops one constraint after so many tries


@dataclass(frozen=True)
class BlockSizes:
    """Rows and columns, in patches, of the blocks of one step."""

    target: tuple[int, int]
    context: tuple[int, int]

    @property
    def target_tokens(self) -> int:
        return self.target[0] * self.target[1]


@njit(cache=True)
def _place(key, counter, block, grid, inclusive):
    """Top left corner of a block, uniform over its positions; ``inclusive`` 0 leaves out the last row and column."""
    top = below(key, counter, grid[0] - block[0] + inclusive)
    left = below(key, counter + 1, grid[1] - block[1] + inclusive)
    return top, left


@njit(cache=True)
def _write_block(top, left, block, columns, tokens):
    token = 0
    for row in range(top, top + block[0]):
        for column in range(left, left + block[1]):
            tokens[token] = row * columns + column
            token += 1


@njit(cache=True)
def draw_multiblock(seed, step, sample, grid, target, context, context_tokens, tokens, targets):
    """Fill ``tokens`` int32 [K] (ascending) and ``targets`` int32 [M, T] of one image; returns K."""
    key = stream(seed, MASK, step, sample)
    num_targets = targets.shape[0]
    tops = np.empty(num_targets, np.int64)
    lefts = np.empty(num_targets, np.int64)
    free = np.empty((grid[0], grid[1]), np.bool_)
    counter = 0
    distinct = num_targets
    attempt = 0
    while True:
        for m in range(num_targets):
            tops[m], lefts[m] = _place(key, counter, target, grid, 1)
            counter += 2
            if m >= distinct:
                tops[m], lefts[m] = tops[0], lefts[0]
        top, left = _place(key, counter, context, grid, 1)
        counter += 2
        if distinct == 0:  # last resort, valid wherever a valid draw exists: opposite corners
            top, left = 0, 0
            tops[:] = grid[0] - target[0]
            lefts[:] = grid[1] - target[1]
        free[:, :] = False
        free[top : top + context[0], left : left + context[1]] = True
        for m in range(num_targets):
            free[tops[m] : tops[m] + target[0], lefts[m] : lefts[m] + target[1]] = False
        num_free = free.sum()
        if num_free >= context_tokens or distinct == 0:
            break
        attempt += 1
        if attempt % ATTEMPTS == 0:
            distinct -= 1
    # Selection sampling (Knuth, Algorithm S): K of the free patches, each set equally likely, in ascending order.
    kept = 0
    for row in range(grid[0]):
        for column in range(grid[1]):
            if free[row, column]:
                if uniform(key, counter) * num_free < context_tokens - kept:
                    tokens[kept] = row * grid[1] + column
                    kept += 1
                counter += 1
                num_free -= 1
    for m in range(num_targets):
        _write_block(tops[m], lefts[m], target, grid[1], targets[m])
    return kept


@njit(cache=True)
def draw_reference(seed, step, sample, grid, target, context, min_keep, tokens, targets):
    """Fill ``tokens`` int32 [N] and ``targets`` int32 [M, T] as the released code draws them, before the truncation.

    Returns the number of context tokens. Target blocks may overlap; the context block must not meet them, but after 20
    failed draws in a row one target block (from the last) is no longer respected.
    """
    key = stream(seed, MASK, step, sample)
    num_targets = targets.shape[0]
    blocked = np.zeros((num_targets, grid[0], grid[1]), np.bool_)
    counter = 0
    for m in range(num_targets):
        top, left = _place(key, counter, target, grid, 0)
        counter += 2
        blocked[m, top : top + target[0], left : left + target[1]] = True
        _write_block(top, left, target, grid[1], targets[m])
    respected = num_targets
    patience = _REFERENCE_PATIENCE
    while True:
        top, left = _place(key, counter, context, grid, 0)
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
        if kept > min_keep:
            return kept
        patience -= 1
        if patience == 0:
            respected = max(0, respected - 1)
            patience = _REFERENCE_PATIENCE


@njit(cache=True)
def _smallest_context(seed, step, samples, grid, target, context, min_keep, num_targets):
    tokens = np.empty(grid[0] * grid[1], np.int32)
    targets = np.empty((num_targets, target[0] * target[1]), np.int32)
    smallest = grid[0] * grid[1]
    for sample in samples:
        kept = draw_reference(seed, step, sample, grid, target, context, min_keep, tokens, targets)
        smallest = min(smallest, kept)
    return smallest


@dataclass(frozen=True, kw_only=True)
class MultiblockSampler:
    """The paper's masks; see the module's text. ``grid`` is (rows, columns) of patches."""

    seed: int
    grid: tuple[int, int]
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    context_tokens: int

    def __post_init__(self) -> None:
        worst = min(self._possible_sizes(), key=self._room)
        if self.context_tokens > self._room(worst):
            raise UserError(
                f"masks.context_tokens = {self.context_tokens} cannot be drawn on a grid of {_by(self.grid)} patches: a "
                f"context block of {_by(worst.context)} leaves at most {self._room(worst)} patches beside a target block "
                f"of {_by(worst.target)}; lower masks.context_tokens or masks.target_scale"
            )

    def block_sizes(self, step: int) -> BlockSizes:
        """The sizes that the whole global batch of ``step`` shares: equal shapes on every rank."""
        key = np.uint64(stream(np.uint64(self.seed), BLOCK_SIZE, step, 0))
        return self._sizes(*(uniform(key, counter) for counter in range(3)))

    def max_target_tokens(self) -> int:
        """The largest T of any step."""
        return max(sizes.target_tokens for sizes in self._possible_sizes())

    def draw(self, step: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Context int32 [K] and targets int32 [M, T] of one image."""
        sizes = self.block_sizes(step)
        tokens = np.empty(self.context_tokens, np.int32)
        targets = np.empty((self.num_targets, sizes.target_tokens), np.int32)
        draw_multiblock(
            np.uint64(self.seed), step, sample, self.grid, sizes.target, sizes.context, self.context_tokens, tokens, targets
        )
        return tokens, targets

    def context_count(self, step: int, group: np.ndarray) -> int:
        """Context tokens of every image of a batch: K, whatever the batch."""
        return self.context_tokens

    def _sizes(self, scale: float, aspect: float, context: float) -> BlockSizes:
        rows, columns = self.grid
        area = rows * columns * _between(self.target_scale, scale)
        ratio = _between(self.target_aspect_ratio, aspect)  # height over width
        target = (_clip(math.sqrt(area * ratio), rows), _clip(math.sqrt(area / ratio), columns))
        # The paper's context block is square on a square image; on any other it keeps the image's shape.
        side = math.sqrt(_between(self.context_scale, context))
        return BlockSizes(target, (_clip(rows * side, rows), _clip(columns * side, columns)))

    def _possible_sizes(self) -> set[BlockSizes]:
        steps = [i / 60 for i in range(61)]
        targets = {self._sizes(scale, aspect, 0.0).target for scale in steps for aspect in steps}
        contexts = {self._sizes(0.0, 0.0, context).context for context in steps}
        return {BlockSizes(target, context) for target in targets for context in contexts}

    def _room(self, sizes: BlockSizes) -> int:
        """The most context patches that any draw leaves: the blocks in opposite corners."""
        overlap = [max(0, t + c - side) for t, c, side in zip(sizes.target, sizes.context, self.grid, strict=True)]
        return sizes.context[0] * sizes.context[1] - overlap[0] * overlap[1]


@dataclass(frozen=True, kw_only=True)
class ReferenceSampler:
    """The released code's masks; see the module's text. Kept for comparison, defects included."""

    seed: int
    grid: tuple[int, int]
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    truncation_group: int = 128

    def __post_init__(self) -> None:
        sizes = [self._sizes(i / 1000, j / 50) for i in range(1001) for j in range(51)]
        target = min((size.target for size in sizes), key=lambda block: block[0] * block[1])
        context = min((size.context for size in sizes), key=lambda block: block[0] * block[1])
        for name, block in (("target", target), ("context", context)):
            if block[0] * block[1] <= self.min_keep or min(block) < 1:
                raise UserError(
                    f"the reference sampler never ends on a grid of {_by(self.grid)} patches: a {name} block of "
                    f"{_by(block)} does not hold more than masks.min_keep = {self.min_keep} patches; lower "
                    "masks.min_keep or set masks.sampler to multiblock"
                )

    def block_sizes(self, step: int) -> BlockSizes:
        """The sizes of ``step``. The released code draws them once per batch and iteration, alike on every rank."""
        key = np.uint64(stream(np.uint64(self.seed), BLOCK_SIZE, step, 0))
        return self._sizes(uniform(key, 0), uniform(key, 1))

    def max_target_tokens(self) -> int:
        """The largest T of any step."""
        return max(self._sizes(i / 1000, 0.0).target_tokens for i in range(1001))

    def draw(self, step: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Context int32 [K], not truncated, and targets int32 [M, T] of one image."""
        sizes = self.block_sizes(step)
        tokens = np.empty(self.grid[0] * self.grid[1], np.int32)
        targets = np.empty((self.num_targets, sizes.target_tokens), np.int32)
        kept = draw_reference(
            np.uint64(self.seed), step, sample, self.grid, sizes.target, sizes.context, self.min_keep, tokens, targets
        )
        return tokens[:kept], targets

    def context_count(self, step: int, group: np.ndarray) -> int:
        """Context tokens that every image of a truncation group keeps: the group's minimum. ``group``: samples [G]."""
        sizes = self.block_sizes(step)
        return _smallest_context(
            np.uint64(self.seed), step, group, self.grid, sizes.target, sizes.context, self.min_keep, self.num_targets
        )

    def _sizes(self, target: float, context: float) -> BlockSizes:
        # One number for scale and aspect ratio, and blocks strictly smaller than the grid: as released.
        return BlockSizes(
            self._block(target, self.target_scale, self.target_aspect_ratio),
            self._block(context, self.context_scale, (1.0, 1.0)),
        )

    def _block(self, number: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        rows, columns = self.grid
        area = int(rows * columns * _between(scale, number))
        ratio = _between(aspect, number)
        return min(round(math.sqrt(area * ratio)), rows - 1), min(round(math.sqrt(area / ratio)), columns - 1)


MaskSampler = MultiblockSampler | ReferenceSampler


def default_context_tokens(grid: tuple[int, int]) -> int:
    """The context budget K: 72 of the 256 patches of ViT-H/14 at 224 (98.4 % of all draws hold as many), in proportion
    on other grids. Close to what the released code keeps at 128 images a GPU (68.3), so as costly as the reference."""
    return max(1, round(grid[0] * grid[1] * 72 / 256))


def _between(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + number * (bounds[1] - bounds[0])


def _clip(length: float, side: int) -> int:
    return max(1, min(round(length), side))


def _by(block: tuple[int, int]) -> str:
    return f"{block[0]} x {block[1]}"
