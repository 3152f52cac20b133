"""The activations that a micro-batch keeps for its backward pass, from shapes alone: bytes an image.

What torch saves, each tensor once and parameters left out, of the blocks in ``ijepa_ds/method/blocks.py``:

* eager: the inputs of norms, products, attention and GELU. Fused attention keeps its result and the logarithm of each
  row's sum beside queries, keys and values; explicit products keep the matrix of the weights.
* compiled: the same. Torch's partitioner computes nothing again that a product of the backward pass reads.
* checkpointed: the input of each block, and all of one block while that is computed again.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, P predictor width, F
hidden width of an MLP; L tokens of a sequence, Q of them leave the block.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.method.flops import CHANNELS, Shapes

_EXACT = 4  # bytes of an fp32 value
_STATISTICS = 2 * _EXACT  # mean and deviation of a token, which a norm keeps


@dataclass(frozen=True)
class Kept:
    """How activations are kept.

    ``product`` and ``residual`` are the bytes of a value inside a block and of the tokens between blocks: 2 and 2 in
    bf16, 4 and 4 in fp32, 2 and 4 under autocast. ``fused``: torch's attention, as on GPUs.
    """

    product: int
    residual: int
    fused: bool = True


@dataclass(frozen=True)
class Block:
    """A block's activations: ``sequences`` of L tokens whose last Q leave it.

    ``entering``: the different tokens that enter all sequences together, where they share some; None: all of them.
    """

    size: Dimensions
    tokens: int
    leaving: int
    sequences: int = 1
    entering: int | None = None

    @property
    def inputs(self) -> int:
        """Tokens that the first norm sees."""
        return self.sequences * self.tokens if self.entering is None else self.entering

    def input_bytes(self, kept: Kept) -> float:
        """What checkpointing keeps."""
        return self.inputs * self.size.width * kept.residual

    def bytes(self, kept: Kept) -> float:
        """All that the backward pass reads."""
        width, tokens, leaving = self.size.width, self.sequences * self.tokens, self.sequences * self.leaving
        shorter = self.leaving < self.tokens
        # Queries of the last tokens are a product of a copy of them. But where sequences share tokens too, they are a
        # part of their own tokens' queries, keys and values, of which fused attention keeps no copy.
        copied = leaving if shorter and self.entering is None else 0
        queries = 3 * leaving if shorter and self.entering is not None and kept.fused else leaving
        norms = self.inputs + leaving
        values = width * (norms + copied + queries + 2 * tokens + leaving) + 2 * self.size.hidden * leaving
        attention = self.size.heads * leaving * (_EXACT if kept.fused else self.tokens * kept.product)
        return norms * (width * kept.residual + _STATISTICS) + values * kept.product + attention


@dataclass(frozen=True)
class Layer:
    """What a layer of the trained networks keeps, bytes of one image.

    ``recomputed``: beside that, while a checkpointed block of it is computed again.
    """

    kept: float
    recomputed: float = 0.0


def layers(
    shapes: Shapes, kept: Kept, *, context_tokens: int, target_tokens: int, num_targets: int, checkpointed: bool = False
) -> list[Layer]:
    """Of the embedding, each block of the context encoder, its norm, and the predictor with the loss."""
    encoder, predicted = shapes.encoder, num_targets * target_tokens
    block = _stack([Block(encoder, context_tokens, context_tokens)], kept, checkpointed)
    pixels = context_tokens * CHANNELS * shapes.patch_size**2 * kept.product
    predictor = _stack(
        predictor_blocks(shapes.predictor, context_tokens, target_tokens, num_targets), kept, checkpointed
    )
    loss = 2 * _EXACT * predicted * encoder.width  # predictions and targets
    return [
        Layer(pixels),
        *[block] * encoder.depth,
        Layer(_last_norm(encoder, context_tokens, kept)),
        Layer(predictor.kept + _last_norm(shapes.predictor, predicted, kept) + loss, predictor.recomputed),
    ]


def predictor_blocks(size: Dimensions, context_tokens: int, target_tokens: int, num_targets: int) -> list[Block]:
    """The predictor's, of one image: the first shares the context, of the last only the mask tokens are asked for."""
    sequence, entering = context_tokens + target_tokens, context_tokens + num_targets * target_tokens
    if size.depth == 1:
        return [Block(size, sequence, target_tokens, num_targets, entering)]
    first = Block(size, sequence, sequence, num_targets, entering)
    between = [Block(size, sequence, sequence, num_targets)] * (size.depth - 2)
    return [first, *between, Block(size, sequence, target_tokens, num_targets)]


def _stack(blocks: list[Block], kept: Kept, checkpointed: bool) -> Layer:
    whole = [block.bytes(kept) for block in blocks]
    if not checkpointed:
        return Layer(sum(whole))
    inputs = [block.input_bytes(kept) for block in blocks]
    return Layer(sum(inputs), max(all_ - own for all_, own in zip(whole, inputs, strict=True)))


def _last_norm(size: Dimensions, tokens: int, kept: Kept) -> float:
    """Its input, and its result, which the product that follows keeps."""
    return tokens * (size.width * (kept.residual + kept.product) + _STATISTICS)
