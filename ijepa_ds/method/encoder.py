"""The vision transformer of I-JEPA on timm's blocks and under timm's tensor names.

Fixed sine-cosine positions, no class token, pre-norm blocks, LayerNorm eps 1e-6, qkv bias (arXiv 2301.08243, app. A.1).

Shapes: B images, N patches, K context tokens, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import create_model, is_model
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from ijepa_ds.errors import UserError
from ijepa_ds.method.blocks import Regions, block_at, run, select_tokens, whole_block
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


class VisionTransformer(TimmVisionTransformer):
    """Context and target encoder. ``image_size`` and the grid are (rows, columns)."""

    pos_embed: nn.Parameter

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
        self.compiled: Regions = {}
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
        tokens = self.embed(images, indices)
        last = len(self.blocks) - blocks_out  # the first block whose output is asked for
        features = []
        for layer, block in enumerate(self.blocks):
            tokens = self.run_block(whole_block, block, tokens)
            if layer >= last:
                features.append(self.norm(tokens))
        return features[0] if blocks_out == 1 else features

    def features_at(self, images: Tensor, target_blocks: Tensor) -> Tensor:
        """:meth:`layers_at` of the last block alone."""
        return self.layers_at(images, target_blocks, 1)[0]

    def layers_at(self, images: Tensor, target_blocks: Tensor, count: int) -> list[Tensor]:
        """Of each of the last ``count`` blocks' outputs, in order, features after the final norm at target_blocks.

        target_blocks [M, B, T] -> [M * B, T, D] each, block-major.

        The last block computes no more than these. A patch in two target blocks is computed twice: the number of
        different patches is another for each image, and shapes that do not depend on the values can be compiled and
        need not be read back from the device. Where there would be more than all patches, it computes all.
        """
        num_targets, _, target_tokens = target_blocks.shape
        indices = target_blocks.transpose(0, 1).flatten(1)  # [B, M * T]
        tokens, layers = self.embed(images), []
        for index, block in enumerate(self.blocks[:-1]):
            tokens = self.run_block(whole_block, block, tokens)  # [B, N, D]
            if index >= len(self.blocks) - count:
                layers.append(select_tokens(tokens, indices))
        if indices.shape[1] < tokens.shape[1]:
            tokens = self.run_block(block_at, self.blocks[-1], tokens, indices)
        else:
            tokens = select_tokens(self.run_block(whole_block, self.blocks[-1], tokens), indices)
        shape = num_targets, target_tokens
        return [self.norm(layer.unflatten(1, shape).transpose(0, 1).flatten(0, 1)) for layer in (*layers, tokens)]

    def embed(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """Patches [B, N, D] with their positions, or with ``indices`` [B, K] those alone, [B, K, D].

        Of selected patches as a product over their pixels, with the convolution's weights: the others are never read.
        Indices [C * B, K] are of C selections of each image, all of the first, then all of the second.
        """
        if indices is None:
            return self.patch_embed(images) + self.pos_embed
        projection, (height, width) = self.patch_embed.proj, self.patch_embed.patch_size
        if images.shape[2:] != self.patch_embed.img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels, not {self.patch_embed.img_size}")
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        image = torch.arange(len(images), device=images.device).repeat(len(indices) // len(images))[:, None]
        pixels = patches[image, indices // self.grid[1], indices % self.grid[1]].flatten(2)  # [B, K, 3 * p * p]
        return F.linear(pixels, projection.weight.flatten(1), projection.bias) + self.pos_embed[0][indices]

    def run_block(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A function of :mod:`ijepa_ds.method.blocks`, compiled or checkpointed where this network is."""
        function = self.compiled.get(function, function)
        return run(function, *arguments, activation_checkpointing=self.activation_checkpointing)


def set_attention(module: nn.Module, *, fused: bool) -> None:
    """Choose torch's fused attention or explicit products: on a CPU the fused backward is several times slower."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused  # type: ignore[assignment]
