"""The attentive probe: a plain torch block computes the same, and it finds what a mean hides."""

from __future__ import annotations

import itertools
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed_runs import tiny_config
from torch import nn

from ijepa_ds.config import parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.inputs import CachedInputs
from ijepa_ds.evaluation.probes.attentive import AttentiveHead, attend, attentive_probe
from ijepa_ds.evaluation.probes.logistic import logistic_regression
from ijepa_ds.evaluation.probes.standardise import held_out_part, standardise
from ijepa_ds.evaluation.probes.supervised import Course
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.tasks.attentive import check_cached
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.progress import Progress

ALONE = Process(0, 1, torch.device("cpu"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_head(head: AttentiveHead, tokens: torch.Tensor) -> torch.Tensor:
    """The same block of torch's own parts, every token projected to keys (with some bias) and values."""
    width = len(head.query)
    query = head.query.expand(1, len(tokens), -1)  # torch's function wants [tokens, B, D]
    attended, _ = F.multi_head_attention_forward(
        query, tokens.transpose(0, 1), tokens.transpose(0, 1), width, head.attention_heads,
        torch.cat([head.to_query.weight, head.to_key.weight, head.to_value.weight]),
        torch.cat([head.to_query.bias, torch.randn(width, generator=seeded(9)), head.to_value.bias]),
        None, None, False, 0.0, head.project.weight, head.project.bias, need_weights=False,
    )  # fmt: skip
    pooled = (query + attended)[0]
    norm = {"normalized_shape": (width,), "eps": 1e-6}
    hidden = F.layer_norm(pooled, weight=head.norm_mlp.weight, bias=head.norm_mlp.bias, **norm)
    pooled = pooled + head.mlp(hidden)
    return head.classifier(F.layer_norm(pooled, weight=head.norm.weight, bias=head.norm.bias, **norm))


def random_head(seed: int, attention_heads: int = 4) -> AttentiveHead:
    """A head none of whose parameters is 0 or 1."""
    head = AttentiveHead(32, 5, attention_heads, seeded(seed))
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3, generator=seeded(seed))
    return head


@pytest.mark.parametrize("attention_heads", [1, 4])
def test_a_head_equals_the_plain_block(attention_heads):
    head = random_head(0, attention_heads)
    tokens = torch.randn(6, 9, 32, generator=seeded(1))
    ours, plain = attend([head], tokens)[0], plain_head(head, tokens)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in head.named_parameters()]
    gradients = [torch.autograd.grad(logits.square().sum(), list(head.parameters())) for logits in (ours, plain)]
    for name, mine, theirs in zip(names, *gradients, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_heads_together_equal_each_alone():
    heads = [random_head(seed) for seed in range(3)]
    tokens = torch.randn(6, 9, 32, generator=seeded(1))
    together = attend(heads, tokens)
    for head, logits in zip(heads, together, strict=True):
        torch.testing.assert_close(logits, attend([head], tokens)[0])


def needles(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, 16, 32]: one of them is marked and holds the class's direction.

    The others hold a class at random, each class equally often, so that the mean over tokens tells nothing.
    """
    draw = seeded(seed)
    labels = torch.randint(0, 4, (num_images,), generator=draw)
    classes = torch.argsort(torch.rand(num_images, 16, generator=draw)) % 4  # 4 of each, in some order
    place = (classes == labels[:, None]).float().argmax(dim=1)
    directions = torch.eye(32)[:4] * 2
    tokens = directions[classes] + 0.3 * torch.randn(num_images, 16, 32, generator=draw)
    tokens[torch.arange(num_images), place, 31] += 4
    return tokens, labels


def noisy_means(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [n, 16, 32] with a little of the class's direction in each."""
    draw = seeded(seed)
    labels = torch.randint(0, 4, (num_images,), generator=draw)
    return torch.randn(num_images, 16, 32, generator=draw) + 0.4 * torch.eye(32)[labels][:, None], labels


def probed(train, validation, *, grid, epochs, seed: int = 0, batch: int = 64, micro_batch: int = 64):
    """Accuracy of each head in percent."""
    predictions, rate = attentive_probe(
        CachedInputs(*train, batch=batch, seed=seed, process=ALONE),
        [validation[0]],
        train[0].shape[2],
        grid,
        Course(epochs, micro_batch=micro_batch),
        Progress(1, name="attentive probe", enabled=False),
    )
    assert rate > 0 and len(predictions) == len(grid)
    return [100.0 * float((classes == validation[1]).double().mean()) for classes in predictions]


def test_it_finds_what_the_mean_over_patches_hides():
    train, val = needles(1024, 0), needles(256, 1)
    values = probed(train, val, grid=[(1e-5, 0.01), (1e-2, 0.01)], epochs=20)
    space = standardise(train[0].mean(1))
    pooled = logistic_regression(space, train[1], held_out=[held_out_part(train[1], seed=0)])
    right = pooled.logits(space.apply(val[0].mean(1))).argmax(dim=1) == val[1]
    assert float(right.double().mean()) < 0.45  # 0.25 is chance
    assert values[1] > 85 and values[0] < 70


def test_a_grid_of_heads_trains_each_as_if_it_were_alone():
    train, val = noisy_means(96, 0), noisy_means(64, 1)
    options = {"epochs": 12, "seed": 2, "batch": 32, "micro_batch": 20}
    grid = list(itertools.product((1e-3, 3e-3, 1e9), (0.01, 0.4)))  # one learning rate makes its heads diverge
    together = dict(zip(grid, probed(train, val, grid=grid, **options), strict=True))
    assert len(set(together.values())) > 2
    for point in ((1e-3, 0.4), (3e-3, 0.01)):
        assert probed(train, val, grid=[point], **options) == [together[point]]


def test_a_probe_that_diverges_is_refused():
    broken = torch.full((4, 3, 12), float("nan")), torch.arange(4)
    with pytest.raises(UserError, match="attentive probe diverged in epoch 1"):
        probed(broken, broken, grid=[(1e-3, 0.1)], epochs=2, batch=4)


def test_tokens_that_do_not_fit_into_memory_are_refused_at_once():
    module = VisionTransformer((16, 16), 4, Dimensions(8, 1, 1))
    few = {"train": np.arange(5), "validation": np.arange(3)}
    check_cached(setting_of(few), module)
    many = {"train": np.arange(3), "validation": np.broadcast_to(0, 2**40)}  # 0 bytes as a view
    with pytest.raises(UserError, match=r"would hold the tokens of 1099511627779 images.*: leave out --cached"):
        check_cached(setting_of(many), module)


def setting_of(samples: dict[str, np.ndarray]) -> Setting:
    return Setting(Namespace(), parse_config(tiny_config()), SimpleNamespace(samples=samples), ALONE)
