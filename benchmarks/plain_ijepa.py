"""I-JEPA written plainly, the way the paper reads: the baseline of the speed benchmarks.

No trick of any kind, and no handicap either: torch's own layers, a convolution for the patches, attention as
softmax(q k^T) v, one operation after the other; both encoders run on whole images or whole token sets and select
afterwards; the context is repeated for each target block; AdamW as a user writes it; the average one tensor at a time.
Written from the paper (Assran et al., arXiv 2301.08243, section 3 and appendix A.1); parameters have timm's names and
the released code's, as ours have, so that weights can be copied and losses compared. Runs on any device.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, P
predictor width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        images, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(images, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(images, count, width))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(self.act(self.fc1(tokens)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbedding(nn.Module):
    """Patches of an image, row by row, as tokens."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """The vision transformer: fixed positions, no class token. ``grid`` is (rows, columns)."""

    def __init__(self, grid: tuple[int, int], patch_size: int, *, width: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.patch_embed = PatchEmbedding(patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] -> [B, N, D], or [B, K, D] of the ``kept`` patches [B, K] alone."""
        tokens = self.patch_embed(images) + self.pos_embed
        if kept is not None:
            tokens = select(tokens, kept)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Predictor(nn.Module):
    """The narrow transformer that predicts a target block's features from the context's."""

    def __init__(self, grid: tuple[int, int], encoder_width: int, *, width: int, depth: int, heads: int):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], width), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)

    def forward(self, context: Tensor, context_block: Tensor, target_blocks: Tensor) -> Tensor:
        """context [B, K, D], context_block [B, K], target_blocks [M, B, T] -> [M * B, T, D], block-major."""
        blocks, images, _ = target_blocks.shape
        positions = self.predictor_pos_embed.expand(images, -1, -1)  # [B, N, P]
        context = self.predictor_embed(context) + select(positions, context_block)
        queries = torch.cat([self.mask_token + select(positions, block) for block in target_blocks])  # [M * B, T, P]
        tokens = torch.cat([context.repeat(blocks, 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            tokens = block(tokens)
        return self.predictor_proj(self.predictor_norm(tokens)[:, context.shape[1] :])


def select(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens [B, N, D], indices [B, K] -> [B, K, D]."""
    return torch.gather(tokens, 1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def cut_to_shortest(context_blocks: Sequence[Tensor]) -> Tensor:
    """One tensor [B, K] of the images' context blocks [K_b], all cut to the batch's shortest."""
    shortest = min(map(len, context_blocks))
    return torch.stack([block[:shortest] for block in context_blocks])


class PlainTrainer:
    """The method's step in one process: targets, loss, backward pass, AdamW, average.

    Args:
        encoder: the context encoder; the target encoder starts as its copy.
        lr: of AdamW, as ``betas``, ``eps`` and ``weight_decay``, which biases and one-dimensional tensors are spared.
        momentum: of the target encoder's average.
        autocast: forward passes under torch.autocast of this dtype, weights in fp32.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.encoder, self.predictor, self.momentum, self.autocast = encoder, predictor, momentum, autocast
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.averaged = self.target_encoder, encoder
        trained = [p for part in (encoder, predictor) for p in part.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)

    def loss(self, images: Tensor, context_block: Tensor, target_blocks: Tensor) -> Tensor:
        """images [B, 3, H, W], context_block [B, K], target_blocks [M, B, T] -> scalar."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                features = self.target_encoder(images)  # [B, N, D]
                features = F.layer_norm(features, features.shape[-1:])  # over features, without affine
                targets = torch.cat([select(features, block) for block in target_blocks])  # [M * B, T, D]
            context = self.encoder(images, context_block)  # [B, K, D]
            predictions = self.predictor(context, context_block, target_blocks)
            return F.smooth_l1_loss(predictions.float(), targets.float())

    def step(self, images: Tensor, context_block: Tensor, target_blocks: Tensor) -> Tensor:
        """One optimizer step on one batch; returns its loss."""
        loss = self.loss(images, context_block, target_blocks)
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """AdamW, then target <- momentum * target + (1 - momentum) * context."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()

    @torch.no_grad()
    def average(self) -> None:
        """The target encoder's average, one tensor after the other."""
        target_encoder, encoder = self.averaged
        for target, weight in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
            target.mul_(self.momentum).add_((1 - self.momentum) * weight.detach())


class HalfPrecisionTrainer(PlainTrainer):
    """The same with weights in bf16 and fp32 masters, which AdamW moves and the average follows."""

    def __init__(self, encoder: Encoder, predictor: Predictor, **settings: Any) -> None:
        super().__init__(encoder, predictor, **settings)
        masters = [encoder, predictor, self.target_encoder]
        working = [copy.deepcopy(part).to(torch.bfloat16) for part in masters]
        self.encoder, self.predictor, self.target_encoder = working
        parameters = ([p for part in parts for p in part.parameters()] for parts in (masters, working))
        self.copies = list(zip(*parameters, strict=True))  # fp32, bf16

    def update(self) -> None:
        """Gradients to fp32, AdamW and average on the masters, these back to bf16."""
        for master, weight in self.copies:
            if weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
        super().update()
        with torch.no_grad():
            for master, weight in self.copies:
                weight.copy_(master)
