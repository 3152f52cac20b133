"""Transformer blocks that compute no more than is asked of them, over the weights of timm's plain pre-norm blocks.

A block's output at some tokens needs the keys and values of all, but queries, projection and MLP of those tokens
alone. A ``block`` is timm's ``Block`` without dropout, layer scale and norms of queries and keys.

Shapes: S sequences, L tokens of a sequence, Q tokens whose output is asked for, D width; B images, K context tokens,
M target blocks, T tokens of a target block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Regions = dict[Callable[..., Tensor], Callable[..., Tensor]]  # functions of this file -> the same, compiled


def run(function: Callable[..., Tensor], *arguments: Any, activation_checkpointing: bool) -> Tensor:
    """The function's result; with checkpointing its activations are computed again in the backward pass."""
    if activation_checkpointing and torch.is_grad_enabled():
        # No block draws random numbers, so there is no state of a generator to keep.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def whole_block(block: Any, tokens: Tensor) -> Tensor:
    """[S, L, D] -> [S, L, D]."""
    return block(tokens)


def block_at(block: Any, tokens: Tensor, indices: Tensor) -> Tensor:
    """The block's output at ``indices`` [S, Q] of tokens [S, L, D]: [S, Q, D]."""
    normed = block.norm1(tokens)
    return _block_at(block, normed, select_tokens(normed, indices), select_tokens(tokens, indices))


def block_at_last(block: Any, tokens: Tensor, count: int) -> Tensor:
    """The block's output at the last ``count`` = Q of tokens [S, L, D]: [S, Q, D]."""
    normed = block.norm1(tokens)
    return _block_at(block, normed, normed[:, -count:], tokens[:, -count:])


def block_of_shared_context(block: Any, context: Tensor, own: Tensor) -> Tensor:
    """context [B, K, D], own [M, B, T, D] -> [M * B, K + T, D]: M sequences an image, each of the context and its own.

    Norm, queries, keys and values of the context are computed once an image.
    """
    context_qkv, own_qkv = (block.attn.qkv(block.norm1(tokens)) for tokens in (context, own))
    queries, keys, values = _join(context_qkv, own_qkv).chunk(3, dim=-1)
    return _finish(block, _join(context, own), _attend(block.attn, queries, keys, values))


def block_of_shared_context_at_own(block: Any, context: Tensor, own: Tensor) -> Tensor:
    """As :func:`block_of_shared_context`, but the output at the M * B sequences' own tokens alone: [M * B, T, D]."""
    context_qkv, own_qkv = (block.attn.qkv(block.norm1(tokens)) for tokens in (context, own))
    width = context.shape[-1]
    keys, values = _join(context_qkv[..., width:], own_qkv[..., width:]).chunk(2, dim=-1)
    queries = own_qkv[..., :width].flatten(0, 1)
    return _finish(block, own.flatten(0, 1), _attend(block.attn, queries, keys, values))


def select_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens [S, L, D], indices [S, Q] -> [S, Q, D]."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def _join(context: Tensor, own: Tensor) -> Tensor:
    """context [B, K, ...], own [M, B, T, ...] -> [M * B, K + T, ...] in one copy."""
    return torch.cat([context.expand(len(own), *context.shape), own], dim=2).flatten(0, 1)


def _block_at(block: Any, normed: Tensor, asked_normed: Tensor, asked: Tensor) -> Tensor:
    """All tokens after the first norm [S, L, D], those asked for after and before it [S, Q, D] -> [S, Q, D]."""
    width, qkv = asked.shape[-1], block.attn.qkv
    weights, biases = qkv.weight.split([width, 2 * width]), qkv.bias.split([width, 2 * width])
    queries = F.linear(asked_normed, weights[0], biases[0])
    keys, values = F.linear(normed, weights[1], biases[1]).chunk(2, dim=-1)
    return _finish(block, asked, _attend(block.attn, queries, keys, values))


def _attend(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """queries [S, Q, D], keys and values [S, L, D] -> [S, Q, D], before the projection; fused or not as timm's flag."""
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (queries, keys, values))
    if attention.fused_attn:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        attended = ((q * attention.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return attended.transpose(1, 2).flatten(2)


def _finish(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention: projection and MLP, each beside its residual."""
    tokens = tokens + block.attn.proj(attended)
    return tokens + block.mlp(block.norm2(tokens))
