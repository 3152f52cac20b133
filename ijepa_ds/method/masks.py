"""Mask samplers: which patches the context encoder sees and which four blocks it must predict.

Two samplers (Assran et al., arXiv 2301.08243, section 3 and appendix A.1):

* ``multiblock`` (default): the paper's definition. Scale and aspect ratio are independent, bounds inclusive. The block
  sizes are shared by the whole global batch of a step, positions are each image's own, and every image keeps exactly
  ``context_tokens`` patches, drawn uniformly from its context block. No spatial bias, equal shapes on every rank.
* ``reference``: the distribution of the released code with its peculiarities, for comparison: one random number for
  scale and aspect ratio, the last row and column never used, and the context cut, in row order, to the smallest of a
  group of ``truncation_group`` images (there: the images of one GPU). Each peculiarity can be corrected alone
  (``CORRECTIONS`` of ``mask_draws.py``), to measure what it does.

Of a target block all patches are predicted, or with ``predict_share`` below 1 a fixed number of them, all sets equally
likely (CAPI, Darcet et al., arXiv 2502.08769, predicts 5 % of what it masks): fewer tokens in the predictor, in shapes
that do not depend on the draw.

A mask is a pure function of (seed, step, sample). Patch n = row * columns + column.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, G images of a truncation group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ijepa_ds.errors import UserError
from ijepa_ds.method.mask_draws import (
    Sizes,
    corrections_of_draws,
    draw_multiblock,
    multiblock_sizes,
    reference_functions,
    size_numbers,
    smallest_context,
    thin,
)


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
    corrections: frozenset[str] = frozenset()  # of mask_draws.CORRECTIONS

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
        return smallest_context(
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
