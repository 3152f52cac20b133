"""Floating-point operations of one image in a training step, from shapes alone.

A product of [m, k] and [k, n] counts 2 m k n; attention's two products count, softmax, norms and GELU do not. These are
the operations that the method needs, whoever computes them how: what activation checkpointing computes again is not
among them, and the target encoder has no backward pass. ``exact_savings`` (the default) leaves out what no result
depends on, as the modules here do; without it the count is that of the method written plainly: every block of every
network on all of its tokens, and the patches that the context encoder does not see embedded too.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, P predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_ds.method.encoder import Dimensions

CHANNELS = 3
# A product's backward pass takes two of its size: the gradients of its input and of its weights.
WITH_BACKWARD = 3
WITH_WEIGHT_GRADIENT = 2  # the images get none


@dataclass(frozen=True)
class Flops:
    """Operations of one image in one training step: forward, and backward where there is one."""

    target: float
    context_encoder: float
    predictor: float

    @property
    def total(self) -> float:
        """Of all three networks."""
        return self.target + self.context_encoder + self.predictor


@dataclass(frozen=True)
class Shapes:
    """The sizes that a run does not change; :meth:`flops` takes those that a step chooses."""

    encoder: Dimensions
    predictor: Dimensions
    patch_size: int
    num_patches: int

    def flops(
        self,
        *,
        context_tokens: int,
        target_tokens: int,
        num_targets: int = 4,
        contexts: int = 1,
        exact_savings: bool = True,
    ) -> Flops:
        """Operations of one image whose contexts have K tokens and M targets each, with T tokens."""
        predicted = contexts * num_targets * target_tokens
        return Flops(
            self._target(min(predicted, self.num_patches) if exact_savings else self.num_patches),
            contexts * self._context_encoder(context_tokens, context_tokens if exact_savings else self.num_patches),
            contexts * self._predictor(context_tokens, target_tokens, num_targets, exact_savings),
        )

    def trained_layers(self, *, context_tokens: int, target_tokens: int, num_targets: int = 4) -> list[float]:
        """Of the trained part by layer: embedding, each of the context encoder's blocks, its norm, predictor."""
        counts = self.flops(context_tokens=context_tokens, target_tokens=target_tokens, num_targets=num_targets)
        block = WITH_BACKWARD * _block(self.encoder, context_tokens)
        embedding = WITH_WEIGHT_GRADIENT * self._embedding(context_tokens)
        return [embedding, *[block] * self.encoder.depth, 0.0, counts.predictor]

    def _embedding(self, patches: int) -> float:
        return 2.0 * patches * CHANNELS * self.patch_size**2 * self.encoder.width

    def _target(self, used: int) -> float:
        """``used``: patches whose features are asked for, at which alone the last block has a result to compute."""
        tokens = self.num_patches
        whole = (self.encoder.depth - 1) * _block(self.encoder, tokens)
        return self._embedding(tokens) + whole + _block(self.encoder, tokens, queries=used)

    def _context_encoder(self, tokens: int, embedded: int) -> float:
        blocks = self.encoder.depth * _block(self.encoder, tokens)
        return WITH_WEIGHT_GRADIENT * self._embedding(embedded) + WITH_BACKWARD * blocks

    def _predictor(self, context_tokens: int, target_tokens: int, num_targets: int, exact_savings: bool) -> float:
        sequence, width = context_tokens + target_tokens, self.predictor.width
        last = _block(self.predictor, sequence, queries=target_tokens if exact_savings else sequence)
        blocks = num_targets * ((self.predictor.depth - 1) * _block(self.predictor, sequence) + last)
        if exact_savings:  # the first block's products of the context are the same for all M sequences
            parts = 3 if self.predictor.depth > 1 else 2  # an only block is also the last: no queries of the context
            blocks -= (num_targets - 1) * 2.0 * context_tokens * parts * width**2
        projections = 2.0 * width * self.encoder.width * (context_tokens + num_targets * target_tokens)
        return WITH_BACKWARD * (blocks + projections)


def _block(dimensions: Dimensions, tokens: int, *, queries: int | None = None) -> float:
    """Forward pass of a block over a sequence of ``tokens``, of which ``queries`` (all, if None) leave it."""
    leaving = tokens if queries is None else queries
    width = dimensions.width
    products = 2 * tokens * width + 2 * leaving * width + 2 * leaving * dimensions.hidden  # k v, q and out, MLP
    attention = 2 * tokens * leaving
    return 2.0 * width * (products + attention)
