"""Fine-tuning of the whole encoder with a linear head on its pooled features, as the paper does on 1 % of the labels.

I-JEPA, appendix A: 50 epochs, AdamW, batch 512, lr 3e-5, weight decay 0.4, layer decay 0.75, label smoothing 0.1.

Shapes: B images of a step on this process, D encoder width, C classes, n validation images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.supervised import Batches, fit, predict
from ijepa_ds.method.encoder import VisionTransformer, initialize


@dataclass(frozen=True)
class FineTuneRecipe:
    """The paper's, where it says something. ``lr`` is the head's; the global batch is the caller's, in ``batches``."""

    epochs: int = 50
    lr: float = 3e-5
    weight_decay: float = 0.4
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    warmup_epochs: float = 5.0  # not in the paper: MAE's (arXiv 2111.06377, table 9)
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class FineTuned:
    """What came of it. The value to report is the last epoch's: the best one would be chosen on the validation."""

    accuracy: dict[int, float]  # percent of validation, by epochs done
    predictions: Tensor  # [n], int64, after the last epoch
    labels: Tensor  # [n]
    images_per_second: float  # of training


def fine_tune(
    encoder: VisionTransformer,
    *,
    batches: Batches,
    validation: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    steps_per_epoch: int,
    num_classes: int,
    process: Process,
    recipe: FineTuneRecipe = FineTuneRecipe(),
    micro_batch: int = 64,
    validate_epochs: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> FineTuned:
    """Train ``encoder`` (in place, in float32) and a new linear head; bf16 autocast on a GPU.

    Args:
        encoder: [B, 3, H, W] -> [B, N, D] after its final norm. All of it is trained but the fixed positions.
        batches: epoch -> this process's share of each optimizer step, (images [B, 3, H, W] normalised, labels [B]).
            With the paper's batch of 512, B is 512 over the number of processes.
        validation: -> (images, labels), this process's ``samples[rank::world_size]``.
        steps_per_epoch: the same on every process.
        num_classes: C; labels are 0 to C - 1.
        micro_batch: images computed at once.
        validate_epochs: measure every so many epochs, and after the last.
        seed: of the head's initial weights. The rest is as deterministic as ``batches``.
        say: takes progress lines, on the main process.

    Raises:
        UserError: a setting that cannot be meant, labels outside of the classes, or a loss that is no number.
    """
    if not 0 < recipe.layer_decay <= 1:
        raise UserError(f"layer_decay is {recipe.layer_decay}: give a factor above 0, at most 1")
    head = nn.Linear(encoder.embed_dim, num_classes)
    initialize(head, torch.Generator().manual_seed(seed))
    encoder.to(process.device, torch.float32)
    for name, parameter in encoder.named_parameters():  # it may come frozen, as a target encoder is
        parameter.requires_grad_(name != "pos_embed")
    head.to(process.device)
    groups = layer_decay_groups(
        encoder, head, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    fused = process.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=fused)
    accuracy: dict[int, float] = {}
    measured: dict[str, Tensor] = {}

    def logits(images: Tensor) -> Tensor:
        return head(encoder(images).mean(dim=1))[None]  # [1, B, C]

    def after_epoch(epoch: int) -> None:
        if epoch % validate_epochs and epoch != recipe.epochs:
            return
        encoder.eval()
        (measured["predictions"],), measured["labels"] = predict(
            logits, validation(), num_classes=num_classes, num_heads=1, process=process
        )
        encoder.train()
        accuracy[epoch] = 100.0 * float((measured["predictions"] == measured["labels"]).float().mean())

    encoder.train()
    rate = fit(
        logits,
        optimizer,
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        micro_batch=micro_batch,
        num_classes=num_classes,
        num_heads=1,
        label_smoothing=recipe.label_smoothing,
        process=process,
        name="fine-tuning",
        say=say,
        after_epoch=after_epoch,
    )
    encoder.eval()
    return FineTuned(accuracy, measured["predictions"], measured["labels"], rate)


def layer_decay_groups(
    encoder: VisionTransformer, head: nn.Module, *, lr: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Parameter groups whose ``peak_lr`` falls by ``layer_decay`` with each layer below the head (BEiT, 2106.08254).

    Layers as timm counts them: patch embedding and positions, each block, the final norm with the last block, the
    head. Biases, 1-d tensors and positions get no weight decay. Only parameters that are trained are listed.
    """
    depth = len(encoder.blocks)
    groups: dict[tuple[int, bool], dict] = {}
    named = [*encoder.named_parameters(), *((f"head.{name}", weight) for name, weight in head.named_parameters())]
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, depth)
        decays = parameter.ndim > 1 and name != "pos_embed"
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "names": [],
                "peak_lr": lr * layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_of(name: str, depth: int) -> int:
    """0 for what stands before the blocks, i + 1 for block i, ``depth + 1`` for the head."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if name.startswith("head."):
        return depth + 1
    return depth if name.startswith("norm.") else 0
