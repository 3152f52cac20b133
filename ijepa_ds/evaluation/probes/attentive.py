"""Attentive probe: one cross-attention block whose learned query reads the frozen patch tokens, and a linear head.

V-JEPA (arXiv 2404.08471): the pooling is learned, as an encoder trained without a class token need not keep what a
class is in the mean of its patches. A grid of heads over learning rate and weight decay is trained in one pass: they
share the encoder's forward, and the two products with the tokens.

Shapes: B images, N patches, D encoder width, G heads of the grid, h attention heads, C classes, n validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.supervised import Batches, fit, predict
from ijepa_ds.method.encoder import INIT_STD

LRS = (3e-4, 1e-3, 3e-3)
WEIGHT_DECAYS = (0.01, 0.1, 0.4)
HEAD_WIDTH = 64  # of an attention head, where the width allows it


@dataclass(frozen=True)
class AttentiveProbe:
    """Every head's accuracy; the best is reported, and which it was, as for the linear heads."""

    grid: list[dict[str, float]]  # lr, weight_decay, value (percent of validation)
    best: int  # index into grid
    predictions: Tensor  # [n], int64, of the best head
    labels: Tensor  # [n]
    images_per_second: float  # of training, the encoder's forward included


class AttentiveHead(nn.Module):
    """query + cross-attention, + MLP, norm, linear. The tokens come as the encoder's final norm left them.

    The query is one for all images, so it is multiplied into the key weights once, instead of every token being
    multiplied by them; and the attention's mean is taken before the value weights. Both are exact, and make the
    products with the tokens D/h times smaller. A bias of the keys would cancel in the softmax: there is none.
    """

    def __init__(self, width: int, num_classes: int, *, num_heads: int, generator: torch.Generator | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(width))
        self.to_query, self.to_value, self.project = (nn.Linear(width, width) for _ in range(3))
        self.to_key = nn.Linear(width, width, bias=False)
        self.norm_mlp, self.norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.classifier = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.query, std=INIT_STD, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def token_queries(self) -> Tensor:
        """[h, D]: a token's product with row i is attention head i's score of it."""
        query = self.to_query(self.query).view(self.num_heads, 1, -1)  # [h, 1, D/h]
        keys = self.to_key.weight.view(self.num_heads, -1, len(self.query))  # [h, D/h, D]
        return (query @ keys)[:, 0] * query.shape[-1] ** -0.5

    def classify(self, attended: Tensor) -> Tensor:
        """attended [B, h, D], the tokens' mean under each attention head -> logits [B, C]."""
        values = self.to_value.weight.view(self.num_heads, -1, len(self.query))  # [h, D/h, D]
        mixed = (attended.transpose(0, 1) @ values.transpose(1, 2)).transpose(0, 1)  # [B, h, D/h]
        pooled = self.query + self.project(mixed.flatten(1) + self.to_value.bias)  # [B, D]
        pooled = pooled + self.mlp(self.norm_mlp(pooled))
        return self.classifier(self.norm(pooled))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, D] -> logits [B, C]."""
        return attend([self], tokens)[0]


def attend(heads: Iterable[AttentiveHead], tokens: Tensor) -> Tensor:
    """tokens [B, N, D] -> logits [G, B, C] of all heads, with two products of the tokens for all of them together."""
    heads = list(heads)
    queries = torch.cat([head.token_queries() for head in heads])  # [G h, D]
    weights = F.linear(tokens, queries).float().softmax(dim=1)  # [B, N, G h]
    attended = weights.to(tokens.dtype).transpose(1, 2) @ tokens  # [B, G h, D]
    split = attended.split([head.num_heads for head in heads], dim=1)
    return torch.stack([head.classify(part) for head, part in zip(heads, split, strict=True)])


def attentive_probe(
    encode: Callable[[Tensor], Tensor],
    *,
    width: int,
    batches: Batches,
    validation: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    steps_per_epoch: int,
    num_classes: int,
    process: Process,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    num_heads: int | None = None,
    epochs: int = 20,
    warmup_epochs: float = 0.0,
    micro_batch: int = 256,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> AttentiveProbe:
    """Train a head for each learning rate and weight decay with AdamW and a cosine, all on the same batches.

    Args:
        encode: inputs of ``batches`` -> patch tokens [B, N, D] after the encoder's final norm; run without gradients.
        width: D.
        batches: epoch -> this process's share of each optimizer step, (inputs [B, ...], labels [B]).
        validation: -> (inputs, labels), this process's ``samples[rank::world_size]``.
        steps_per_epoch: the same on every process.
        num_classes: C; labels are 0 to C - 1.
        num_heads: h; default: attention heads 64 wide, one where the width is no multiple of that.
        epochs: V-JEPA's 20 for images.
        micro_batch: images computed at once.
        seed: of the initial weights, which all heads of the grid share.
        say: takes progress lines, on the main process.

    Raises:
        UserError: labels outside of the classes, a width that the heads do not divide, or every head diverged.
    """
    num_heads = num_heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1)
    if width % num_heads:
        raise UserError(f"{num_heads} attention heads do not divide a width of {width}: choose a divisor")
    grid = [(lr, weight_decay) for lr in lrs for weight_decay in weight_decays]
    if not grid:
        raise UserError("an attentive probe without learning rates or weight decays has no heads: give some of both")
    heads = nn.ModuleList(
        AttentiveHead(width, num_classes, num_heads=num_heads, generator=torch.Generator().manual_seed(seed))
        for _ in grid
    ).to(process.device)

    def logits(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = encode(inputs)
        return attend(heads, tokens.detach())

    groups = [group for head, point in zip(heads, grid, strict=True) for group in _groups(head, *point)]
    rate = fit(
        logits,
        torch.optim.AdamW(groups, fused=process.device.type == "cuda"),
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        micro_batch=micro_batch,
        num_classes=num_classes,
        num_heads=len(grid),
        label_smoothing=0.0,
        process=process,
        name="attentive probe",
        say=say,
        after_epoch=lambda _: None,
    )
    predictions, labels = predict(logits, validation(), num_classes=num_classes, num_heads=len(grid), process=process)
    values = (100.0 * (predictions == labels).double().mean(dim=1)).tolist()
    best = max(range(len(grid)), key=values.__getitem__)
    scored = [
        {"lr": lr, "weight_decay": weight_decay, "value": value}
        for (lr, weight_decay), value in zip(grid, values, strict=True)
    ]
    return AttentiveProbe(scored, best, predictions[best], labels, rate)


def _groups(head: AttentiveHead, lr: float, weight_decay: float) -> list[dict]:
    """No weight decay on biases, norms and the query."""
    matrices = [parameter for parameter in head.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "peak_lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "peak_lr": lr, "weight_decay": 0.0},
    ]
