"""The method (Assran et al., CVPR 2023, arXiv 2301.08243): context encoder, predictor and loss.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, H x W
pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.predictor import Predictor

TARGET_NORM_EPS = 1e-5
CONTEXT_ENCODER, PREDICTOR = "context_encoder", "predictor"  # the two parts, in the names of their parameters


class IJEPA(nn.Module):
    """What is trained, and what the DeepSpeed engine wraps: context encoder and predictor in one forward pass."""

    def __init__(self, context_encoder: VisionTransformer, predictor: Predictor) -> None:
        super().__init__()
        self.context_encoder = context_encoder
        self.predictor = predictor

    def forward(self, images: Tensor, context_block: Tensor, target_blocks: Tensor, targets: Tensor) -> Tensor:
        """images [B, 3, H, W], context_block [B, K], target_blocks [M, B, T], targets [M * B, T, D] -> scalar loss."""
        return prediction_loss(self.predict(images, context_block, target_blocks), targets)

    def predict(self, images: Tensor, context_block: Tensor, target_blocks: Tensor) -> Tensor:
        """The predicted features of the target blocks, [M * B, T, D], block-major."""
        context = self.context_encoder(images, context_block)  # [B, K, D]
        return self.predictor(context, context_block, target_blocks)


def prediction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 (beta 1), mean over blocks, images, tokens and features, in fp32.

    The released code's loss; the paper writes L2. Both [M * B, T, D].
    """
    return F.smooth_l1_loss(predictions.float(), targets.float())


def normalize_targets(features: Tensor) -> Tensor:
    """[..., D] -> fp32, layer-normalised over features without affine."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=TARGET_NORM_EPS)


def normalize_images(images: Tensor, *, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images [B, H, W, 3] -> [B, 3, H, W] of ``dtype``; mean and std in units of a pixel's full range."""
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
