"""Attentive probe: one cross-attention block whose learned query reads the frozen patch tokens, and a linear head.

V-JEPA (arXiv 2404.08471): the pooling is learned, as an encoder trained without a class token need not keep what a
class is in the mean of its patches. A grid of heads over learning rate and weight decay is trained in one pass: they
share the encoder's forward, and the two products with the tokens.

Shapes: B images, N patches, D encoder width, G heads of the grid, h attention heads of each, C classes, n validation
images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ijepa_ds.evaluation.inputs import Inputs
from ijepa_ds.evaluation.probes.supervised import Course, fit, predict
from ijepa_ds.method.encoder import INIT_STD
from ijepa_ds.progress import Progress

HEAD_WIDTH = 64  # of an attention head, where the width allows it


class AttentiveHead(nn.Module):
    """Query + cross-attention, + MLP, norm, linear. The tokens come as the encoder's final norm left them.

    The query is one for all images, so it is multiplied into the key weights once, instead of every token being
    multiplied by them; and the attention's mean is taken before the value weights. Both are exact, and make the
    products with the tokens D/h times smaller. A bias of the keys would cancel in the softmax: there is none.
    """

    def __init__(self, width: int, num_classes: int, attention_heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.attention_heads = attention_heads
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
        """Rows [h, D]: a token's product with row i is attention head i's score of it."""
        query = self.to_query(self.query).view(self.attention_heads, 1, -1)  # [h, 1, D/h]
        keys = self.to_key.weight.view(self.attention_heads, -1, len(self.query))  # [h, D/h, D]
        return (query @ keys)[:, 0] * query.shape[-1] ** -0.5

    def classify(self, attended: Tensor) -> Tensor:
        """Means of the tokens under each attention head, [B, h, D] -> logits [B, C]."""
        values = self.to_value.weight.view(self.attention_heads, -1, len(self.query))  # [h, D/h, D]
        mixed = (attended.transpose(0, 1) @ values.transpose(1, 2)).transpose(0, 1)  # [B, h, D/h]
        pooled = self.query + self.project(mixed.flatten(1) + self.to_value.bias)  # [B, D]
        pooled = pooled + self.mlp(self.norm_mlp(pooled))
        return self.classifier(self.norm(pooled))


def attend(heads: Sequence[AttentiveHead], tokens: Tensor) -> Tensor:
    """Tokens [B, N, D] -> logits [G, B, C] of all heads, with two products of the tokens for all of them together."""
    queries = torch.cat([head.token_queries() for head in heads])  # [G h, D]
    weights = F.linear(tokens, queries).float().softmax(dim=1)  # [B, N, G h]
    attended = weights.to(tokens.dtype).transpose(1, 2) @ tokens  # [B, G h, D]
    split = attended.split([head.attention_heads for head in heads], dim=1)
    return torch.stack([head.classify(part) for head, part in zip(heads, split, strict=True)])


def attentive_probe(
    inputs: Inputs,
    validation: Iterable[Tensor],
    width: int,
    grid: Sequence[tuple[float, float]],
    course: Course,
    progress: Progress,
) -> tuple[list[Tensor], float]:
    """Train a head for each learning rate and weight decay of ``grid`` with AdamW and a cosine, on the same batches.

    Inputs are patch tokens [B, N, D] of ``width`` D after the encoder's final norm; all heads start from weights of
    the inputs' seed. ``validation`` has this process's share as :func:`predict` takes it.

    Returns:
        Predictions of each head [n], and images per second of training.
    """
    process = inputs.process
    attention_heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
    seeds = [torch.Generator().manual_seed(inputs.seed) for _ in grid]
    heads = [AttentiveHead(width, inputs.num_classes, attention_heads, seed).to(process.device) for seed in seeds]

    def logits(tokens: Tensor) -> Tensor:
        return attend(heads, tokens)

    groups = [
        {**group, "peak_lr": lr}
        for head, (lr, weight_decay) in zip(heads, grid, strict=True)
        for group in param_groups_weight_decay(head, weight_decay)  # none on biases, norms and the query
    ]
    optimizer = torch.optim.AdamW(groups, fused=process.device.type == "cuda")
    rate = fit(logits, optimizer, inputs, course, progress)
    return list(predict(logits, validation, num_classifiers=len(grid), process=process)), rate
