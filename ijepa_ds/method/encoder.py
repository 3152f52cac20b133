"""The vision transformer of I-JEPA on timm's blocks and under timm's tensor names.

Fixed sine-cosine positions, no class token, pre-norm blocks, LayerNorm eps 1e-6, qkv bias (arXiv 2301.08243, app. A.1).

Shapes: B images, N patches, K context tokens, D encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.models import create_model, is_model
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa_ds.errors import UserError
from ijepa_ds.method.positions import sine_cosine_positions

INIT_STD = 0.02


@dataclass(frozen=True)
class Dimensions:
    """Size of a vision transformer; ``hidden`` is the width inside its MLPs, four times ``width`` where not given."""

    width: int
    depth: int
    heads: int
    hidden: int = 0

    def __post_init__(self) -> None:
        if not self.hidden:
            object.__setattr__(self, "hidden", 4 * self.width)


# Small to giant as in the released code; its tiny and small have depth 12 too.
NAMED_DIMENSIONS = {
    "tiny": Dimensions(192, 12, 3),
    "small": Dimensions(384, 12, 6),
    "base": Dimensions(768, 12, 12),
    "large": Dimensions(1024, 24, 16),
    "huge": Dimensions(1280, 32, 16),
    "giant": Dimensions(1408, 40, 16, 6144),
}


def dimensions_of(name: str) -> Dimensions:
    """Dimensions by our name (tiny to giant) or that of any plain ViT of timm, such as ``vit_small_patch16_224``."""
    if name in NAMED_DIMENSIONS:
        return NAMED_DIMENSIONS[name]
    names = ", ".join(NAMED_DIMENSIONS)
    if not is_model(name):
        raise UserError(f"model.encoder = '{name}' is neither one of {names} nor a model of timm; choose one of these")
    with torch.device("meta"):
        model: Any = create_model(name, num_classes=0)
    block: Any = model.blocks[0] if isinstance(model, TimmVisionTransformer) else None
    if block is None or not isinstance(block.ls1, nn.Identity) or not isinstance(block.attn.q_norm, nn.Identity):
        raise UserError(f"model.encoder = '{name}' is not a plain ViT of timm; choose one of {names} or a vit_*_patch*")
    return Dimensions(model.embed_dim, len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features)


def initialize(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Weights as the released code really has them: every Linear, convolution and mask token at std 0.02, truncated.

    Its division by sqrt(2 * layer) is undone by a later initialisation of its own, so it never took effect. Every
    trainable parameter must be reached, or this raises.
    """
    reached = set()
    for part in module.modules():
        weights = dict(part.named_parameters(recurse=False))
        reached |= set(map(id, weights.values()))
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=INIT_STD, generator=generator)
            nn.init.zeros_(weights["bias"])
        elif "mask_token" in weights:
            nn.init.trunc_normal_(weights["mask_token"], std=INIT_STD, generator=generator)
        elif any(weight.requires_grad for weight in weights.values()):
            raise AssertionError(f"no initialisation is known for {type(part).__name__}: {list(weights)}")


def select_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens [B, N, D], indices [B, K] -> [B, K, D]."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def run_blocks(blocks: nn.Sequential, tokens: Tensor, activation_checkpointing: bool) -> Tensor:
    """[B, N, D] -> [B, N, D]; with checkpointing the activations within a block are computed again in the backward."""
    for block in blocks:
        if activation_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = block(tokens)
    return tokens


class VisionTransformer(TimmVisionTransformer):
    """Context and target encoder. ``image_size`` and the grid are (rows, columns)."""

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        dimensions: Dimensions,
        *,
        activation_checkpointing: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=dimensions.width,
            depth=dimensions.depth,
            num_heads=dimensions.heads,
            mlp_ratio=(dimensions.hidden + 0.5) / dimensions.width,  # of which timm takes int(width * ratio)
            qkv_bias=True,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            num_classes=0,
            weight_init="skip",
        )
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.activation_checkpointing = activation_checkpointing
        # A parameter and not a buffer: the bf16 engine casts parameters only, and an fp32 table would promote the
        # whole residual stream. Frozen: the positions are fixed.
        self.pos_embed = nn.Parameter(sine_cosine_positions(dimensions.width, self.grid)[None], requires_grad=False)
        if self.pos_embed.device.type != "meta":
            initialize(self, generator)

    def forward(  # type: ignore[override]
        self, images: Tensor, indices: Tensor | None = None, *, blocks_out: int = 1
    ) -> Tensor | list[Tensor]:
        """Features after the final norm: images [B, 3, H, W] -> [B, N, D].

        With ``indices`` [B, K] of those patches alone, [B, K, D]; positions are added before the selection. With
        ``blocks_out`` n > 1 the final norm of each of the last n blocks' outputs, in order, as a list.
        """
        if not 1 <= blocks_out <= len(self.blocks):
            raise ValueError(f"blocks_out = {blocks_out} must be from 1 to the encoder's {len(self.blocks)} blocks")
        tokens = self.patch_embed(images) + self.pos_embed  # [B, N, D]
        if indices is not None:
            tokens = select_tokens(tokens, indices)  # [B, K, D]
        tokens = run_blocks(self.blocks[: len(self.blocks) - blocks_out + 1], tokens, self.activation_checkpointing)
        features = [self.norm(tokens)]
        for block in self.blocks[len(self.blocks) - blocks_out + 1 :]:
            tokens = block(tokens)
            features.append(self.norm(tokens))
        return features[0] if blocks_out == 1 else features


def set_attention(module: nn.Module, *, fused: bool) -> None:
    """Choose torch's fused attention or explicit products: on a CPU the fused backward is several times slower."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused  # type: ignore[assignment]
