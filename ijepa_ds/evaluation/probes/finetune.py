"""Fine-tuning of the whole encoder with a linear head on its pooled features, as the paper does on 1 % of the labels.

I-JEPA, appendix A: 50 epochs, AdamW, batch 512, lr 3e-5, weight decay 0.4, layer decay 0.75, label smoothing 0.1.

Shapes: B images of a step on this process, H x W pixels, N patches, D encoder width, n validation images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.probes.supervised import Course, fit, predict
from ijepa_ds.method.encoder import VisionTransformer, initialize
from ijepa_ds.progress import Progress


@dataclass(frozen=True)
class FineTuneRecipe(Course):
    """The paper's, where it says something. ``lr`` is the head's; the batch is that of the inputs."""

    epochs: int = 50
    lr: float = 3e-5
    weight_decay: float = 0.4
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    warmup_epochs: float = 5.0  # not in the paper: MAE's (arXiv 2111.06377, table 9)
    betas: tuple[float, float] = (0.9, 0.999)


def fine_tune(
    encoder: VisionTransformer,
    inputs: Inputs,
    validation: Iterable[Tensor],
    recipe: FineTuneRecipe,
    progress: Progress,
) -> Tensor:
    """Train ``encoder`` (in place, in float32) and a new linear head; bf16 autocast on a GPU.

    All of the encoder is trained but the fixed positions. Inputs are normalised images [B, 3, H, W]; the head's initial
    weights are of the inputs' seed. ``validation`` has this process's share as :func:`predict` takes it.

    Returns:
        Predictions [n] after the last epoch: the best one would be chosen on the validation images.
    """
    process = inputs.process
    encoder.head = nn.Linear(encoder.embed_dim, inputs.num_classes)
    initialize(encoder.head, torch.Generator().manual_seed(inputs.seed))
    encoder.to(process.device, torch.float32).train()
    for name, parameter in encoder.named_parameters():  # it may come frozen, as a target encoder is
        parameter.requires_grad_(name != "pos_embed")
    groups = layer_decay_groups(encoder, recipe)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=process.device.type == "cuda")

    def logits(images: Tensor) -> Tensor:
        return encoder.head(encoder(images).mean(dim=1))[None]  # [1, B, C]

    fit(logits, optimizer, inputs, recipe, progress)
    encoder.eval()
    return predict(logits, validation, num_classifiers=1, process=process)[0]


def layer_decay_groups(encoder: VisionTransformer, recipe: FineTuneRecipe) -> list[dict]:
    """Parameter groups whose ``peak_lr`` falls with each layer below the head (BEiT, arXiv 2106.08254).

    Layers as timm counts them: patch embedding and positions, each block, the final norm with the last block, the
    head. Biases, 1-d tensors and positions get no weight decay. Only parameters that are trained are listed.
    """
    fixed = encoder.no_weight_decay()
    groups = param_groups_layer_decay(encoder, recipe.weight_decay, fixed, layer_decay=recipe.layer_decay)
    return [{**group, "peak_lr": recipe.lr * group["lr_scale"]} for group in groups]
