"""The method (Assran et al., CVPR 2023, arXiv 2301.08243): context encoder, predictor and loss.

Shapes: B images, N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, H x W
pixels. Where each image has C contexts, its C * B contexts and their target blocks stand where else B do, all of the
first, then all of the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_ds.method.encoder import VisionTransformer
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.method.vicreg import VarianceCovariance

TARGET_NORM_EPS = 1e-5
CONTEXT_ENCODER, PREDICTOR = "context_encoder", "predictor"  # the two parts, in the names of their parameters


class IJEPA(nn.Module):
    """What is trained, and what the DeepSpeed engine wraps: context encoder and predictor in one forward pass."""

    def __init__(
        self, context_encoder: VisionTransformer, predictor: Predictor, regulariser: VarianceCovariance | None = None
    ) -> None:
        super().__init__()
        self.context_encoder = context_encoder
        self.predictor = predictor
        self.regulariser = regulariser  # what its weights' sum adds to the loss

    def forward(
        self,
        images: Tensor,
        context_block: Tensor,
        target_blocks: Tensor,
        targets: Tensor,
        keys: Tensor | None = None,
    ) -> Tensor:
        """images [B, 3, H, W], context_block [B, K], target_blocks [M, B, T], targets [M * B, T, D] -> scalar loss.

        ``keys``, int64 [B], are what a predictor with stochastic positions draws its noise from.
        """
        context = self.context_encoder(images, context_block)  # [B, K, D]
        return self.loss(context, context_block, target_blocks, targets, keys)

    def loss(
        self, context: Tensor, context_block: Tensor, target_blocks: Tensor, targets: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """The same from the context encoder's features, [B, K, D]."""
        loss = prediction_loss(self.predictor(context, context_block, target_blocks, keys), targets)
        return loss if self.regulariser is None else loss + self.regulariser(context)

    def predict(
        self, images: Tensor, context_block: Tensor, target_blocks: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """The predicted features of the target blocks, [M * B, T, D], block-major."""
        return self.predictor(self.context_encoder(images, context_block), context_block, target_blocks, keys)


def prediction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 (beta 1), mean over blocks, images, tokens and features, in fp32.

    The released code's loss; the paper writes L2. Both [M * B, T, D].
    """
    return F.smooth_l1_loss(predictions.float(), targets.float())


def mean_of_layers(layers: list[Tensor]) -> Tensor:
    """Targets of several blocks' features, each [..., D]: the mean of what :func:`normalize_targets` makes of each.

    As data2vec has it (Baevski et al., ICML 2022, 2202.03555). Of one block it is I-JEPA's target itself.
    """
    return torch.stack([normalize_targets(features) for features in layers]).mean(dim=0)


def normalize_targets(features: Tensor) -> Tensor:
    """[..., D] -> fp32, layer-normalised over features without affine."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=TARGET_NORM_EPS)


def normalize_images(images: Tensor, *, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images [B, H, W, 3] -> [B, 3, H, W] of ``dtype``; mean and std in units of a pixel's full range."""
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)
