"""The predictor: a narrow ViT that predicts the target encoder's features of each target block (arXiv 2301.08243, 3).

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, P
predictor width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ijepa_ds.method.blocks import (
    Regions,
    block_at_last,
    block_of_shared_context,
    block_of_shared_context_at_own,
    run,
    whole_block,
)
from ijepa_ds.method.encoder import initialize
from ijepa_ds.method.noise import gaussian
from ijepa_ds.method.positions import sine_cosine_positions


class Predictor(nn.Module):
    """Tensor names are the released code's. ``grid`` is (rows, columns) of patches.

    ``stochastic_positions`` is the variance of the noise on the mask tokens' positions, 0 for none (StoP: Bar et al.,
    ICML 2024, 2308.00566): a predictor that is told only roughly where to look cannot rely on the exact place.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        encoder_width: int,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation_checkpointing: bool = False,
        stochastic_positions: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.compiled: Regions = {}
        self.noise_std = stochastic_positions**0.5
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sine_cosine_positions(width, grid)[None], requires_grad=False)
        self.predictor_blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        )
        self.predictor_norm = LayerNorm(width)
        self.predictor_proj = nn.Linear(width, encoder_width)
        initialize(self, generator)

    def forward(
        self, context: Tensor, context_block: Tensor, target_blocks: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """context [B, K, D], context_block [B, K], target_blocks [M, B, T] -> predictions [M * B, T, D], block-major.

        Each target block has a sequence of its own with full attention; sharing the context tokens between the M
        sequences is exact up to the first block's attention and no further. Of the last block's output only the mask
        tokens are asked for. ``keys``, int64 [B], are asked for by stochastic positions alone.
        """
        positions, count = self.predictor_pos_embed[0], target_blocks.shape[2]  # [N, P]
        context = self.predictor_embed(context) + positions[context_block]  # [B, K, P]
        masked = self.mask_token[0] + positions[target_blocks]  # [M, B, T, P]
        if self.noise_std:
            masked = masked + self._noise(keys, target_blocks, masked.dtype)
        first, *between = self.predictor_blocks
        if not between:
            tokens = self.run_block(block_of_shared_context_at_own, first, context, masked)
        else:
            *between, last = between
            tokens = self.run_block(block_of_shared_context, first, context, masked)  # [M * B, K + T, P]
            for block in between:
                tokens = self.run_block(whole_block, block, tokens)
            tokens = self.run_block(block_at_last, last, tokens, count)
        return self.predictor_proj(self.predictor_norm(tokens))  # [M * B, T, D]

    def _noise(self, keys: Tensor | None, target_blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, B, T, P]: noise of the encoder's width through the weights that project the context.

        With weights of its own it would learn to be none (the paper's section 3.3); these are needed for the context.
        """
        if keys is None:
            raise ValueError("stochastic positions need the images' keys")
        noise = gaussian(
            keys, target_blocks, num_patches=self.predictor_pos_embed.shape[1], width=self.predictor_embed.in_features
        )
        return F.linear((self.noise_std * noise).to(dtype), self.predictor_embed.weight)

    def run_block(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A function of :mod:`ijepa_ds.method.blocks`, compiled or checkpointed where this network is."""
        function = self.compiled.get(function, function)
        return run(function, *arguments, activation_checkpointing=self.activation_checkpointing)
