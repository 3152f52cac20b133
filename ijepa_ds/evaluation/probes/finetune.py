"""Fine-tuning of the whole encoder with a linear head on its pooled features, as the paper does on 1 % of the labels.

I-JEPA, appendix A: 50 epochs, AdamW, batch 512, lr 3e-5, weight decay 0.4, layer decay 0.75, label smoothing 0.1.

Shapes: B images of a step on this process, D encoder width, C classes, n validation images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.supervised import Inputs, Training, Validation, fit, predict
from ijepa_ds.method.encoder import VisionTransformer, initialize


@dataclass(frozen=True)
class FineTuneRecipe:
    """The paper's, where it says something. ``lr`` is the head's; the global batch is that of the inputs."""

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
    validation: Validation,
    *,
    num_classes: int,
    process: Process,
    recipe: FineTuneRecipe = FineTuneRecipe(),
    micro_batch: int = 64,
    seed: int = 0,
    name: str = "fine-tuning",
) -> tuple[Tensor, Tensor]:
    """Train ``encoder`` (in place, in float32) with a new linear head; bf16 autocast on a GPU.

    Args:
        encoder: [B, 3, H, W] -> [B, N, D] after its final norm. All of it is trained but the fixed positions.
        inputs: normalised images [B, 3, H, W] and their labels, 0 to C - 1.
        micro_batch: images computed at once.
        seed: of the head's initial weights. The rest is as deterministic as ``inputs``.

    Returns:
        The classes predicted after the last epoch, int64 [n], and the labels [n]. (Those of the best epoch would be
        chosen on validation.)

    Raises:
        UserError: a setting that cannot be meant, or a loss that is no number.
    """
    if not 0 < recipe.layer_decay <= 1:
        raise UserError(f"layer_decay is {recipe.layer_decay}: give a factor above 0, at most 1")
    encoder.head = nn.Linear(encoder.embed_dim, num_classes)  # where timm's layer decay looks for it
    initialize(encoder.head, torch.Generator().manual_seed(seed))
    encoder.to(process.device, torch.float32)
    for parameter_name, parameter in encoder.named_parameters():  # it may come frozen, as a target encoder is
        parameter.requires_grad_(parameter_name != "pos_embed")
    fused = process.device.type == "cuda"
    optimizer = torch.optim.AdamW(layer_decay_groups(encoder, recipe), lr=recipe.lr, betas=recipe.betas, fused=fused)

    def logits(images: Tensor) -> Tensor:
        return encoder.head(encoder(images).mean(dim=1))[None]  # [1, B, C]

    encoder.train()
    training = Training(recipe.epochs, micro_batch, recipe.warmup_epochs, recipe.label_smoothing)
    fit(logits, optimizer, inputs, training, num_classifiers=1, process=process, name=name)
    encoder.eval()
    predictions, labels = predict(logits, validation(), num_classifiers=1, process=process)
    return predictions[0], labels


def layer_decay_groups(encoder: VisionTransformer, recipe: FineTuneRecipe) -> list[dict]:
    """Parameter groups whose ``peak_lr`` falls with each layer below the head (BEiT, arXiv 2106.08254).

    Biases, one-dimensional tensors and positions get no weight decay. Only parameters that are trained are listed.
    """
    groups = param_groups_layer_decay(
        encoder, recipe.weight_decay, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=recipe.layer_decay
    )
    return [{**group, "peak_lr": recipe.lr * group["lr_scale"]} for group in groups]
