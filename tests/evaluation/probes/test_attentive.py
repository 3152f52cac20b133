"""The attentive probe: a plain torch block computes the same, it finds what a mean hides, the encoder stays frozen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Encoder, small_pixels
from ijepa_ds.evaluation.probes.attentive import AttentiveHead, attend, attentive_probe
from ijepa_ds.evaluation.probes.logistic import linear_probe
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.tasks.attentive import check_cached
from ijepa_ds.method.encoder import Dimensions, VisionTransformer

ALONE = Process(0, 1, torch.device("cpu"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_head(head: AttentiveHead, tokens: torch.Tensor) -> torch.Tensor:
    """The same block of torch's own parts, every token projected to keys (with some bias) and values."""
    width = len(head.query)
    query = head.query.expand(1, len(tokens), -1)  # torch's function wants [tokens, B, D]
    attended, _ = F.multi_head_attention_forward(
        query, tokens.transpose(0, 1), tokens.transpose(0, 1), width, head.num_heads,
        torch.cat([head.to_query.weight, head.to_key.weight, head.to_value.weight]),
        torch.cat([head.to_query.bias, torch.randn(width, generator=seeded(9)), head.to_value.bias]),
        None, None, False, 0.0, head.project.weight, head.project.bias, need_weights=False,
    )  # fmt: skip
    pooled = (query + attended)[0]
    norm = {"normalized_shape": (width,), "eps": 1e-6}
    hidden = F.layer_norm(pooled, weight=head.norm_mlp.weight, bias=head.norm_mlp.bias, **norm)
    pooled = pooled + head.mlp(hidden)
    return head.classifier(F.layer_norm(pooled, weight=head.norm.weight, bias=head.norm.bias, **norm))


def random_head(seed: int, *, num_heads: int = 4) -> AttentiveHead:
    """A head none of whose parameters is 0 or 1."""
    head = AttentiveHead(32, 5, num_heads=num_heads)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3, generator=seeded(seed))
    return head


@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_head_equals_the_plain_block(num_heads):
    head = random_head(0, num_heads=num_heads)
    tokens = torch.randn(6, 9, 32, generator=seeded(1))
    ours, plain = head(tokens), plain_head(head, tokens)
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
        torch.testing.assert_close(logits, head(tokens))


def needles(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [n, 16, 32]: one of them is marked and holds the class's direction; the others hold a class at random,
    each class equally often, so that the mean over tokens tells nothing."""
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


def batches_of(data: tuple[torch.Tensor, torch.Tensor], size: int):
    def batches(epoch: int):
        order = torch.randperm(len(data[0]), generator=seeded(epoch))
        return [(data[0][part], data[1][part]) for part in order.split(size)]

    return batches


def test_it_finds_what_the_mean_over_patches_hides():
    train, val = needles(1024, 0), needles(256, 1)
    probe = attentive_probe(
        lambda tokens: tokens, width=32, batches=batches_of(train, 64), validation=lambda: [val], steps_per_epoch=16,
        num_classes=4, process=ALONE, lrs=(1e-5, 1e-2), weight_decays=(0.01,), num_heads=4, epochs=20, say=[].append,
    )  # fmt: skip
    pooled = linear_probe(train[0].mean(1), train[1], val[0].mean(1), val[1], num_classes=4, seed=0)
    assert pooled.accuracy < 45  # 25 is chance
    assert [point["lr"] for point in probe.grid] == [1e-5, 1e-2] and probe.best == 1
    assert probe.grid[1]["value"] > 85 and probe.grid[0]["value"] < 70
    assert 100 * float((probe.predictions == probe.labels).double().mean()) == pytest.approx(probe.grid[1]["value"])
    assert torch.equal(probe.labels, val[1])


def test_a_grid_of_heads_trains_each_as_if_it_were_alone():
    train, val = noisy_means(96, 0), noisy_means(64, 1)

    def values(lrs, weight_decays):
        probe = attentive_probe(
            lambda tokens: tokens, width=32, batches=batches_of(train, 32), validation=lambda: [val],
            steps_per_epoch=3, num_classes=4, process=ALONE, lrs=lrs, weight_decays=weight_decays, epochs=4, seed=2,
            micro_batch=20, say=[].append,
        )  # fmt: skip
        return {(point["lr"], point["weight_decay"]): point["value"] for point in probe.grid}

    together = values((1e-3, 3e-3, 1e9), (0.01, 0.4))  # one learning rate makes its heads diverge
    assert len(together) == 6 and len(set(together.values())) > 2
    for lr, weight_decay in ((1e-3, 0.4), (3e-3, 0.01)):
        assert values((lr,), (weight_decay,))[lr, weight_decay] == together[lr, weight_decay]


def test_the_encoder_stays_as_it_is():
    encoder = VisionTransformer((16, 16), 4, Dimensions(32, 2, 2), generator=seeded(0))
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    data = torch.randn(8, 3, 16, 16, generator=seeded(1)), torch.arange(8) % 2
    forwards = []

    def encode(images):
        forwards.append(len(images))
        return encoder(images)

    attentive_probe(
        encode, width=32, batches=lambda epoch: [data], validation=lambda: [data], steps_per_epoch=1, num_classes=2,
        process=ALONE, epochs=2, micro_batch=4, say=[].append,
    )  # fmt: skip
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in encoder.state_dict().items())
    assert forwards == [4, 4, 4, 4, 8]  # once a micro-batch, for all nine heads


def test_mistakes_are_one_sentence():
    data = torch.randn(4, 3, 12), torch.tensor([0, 1, 2, 3])
    common = {
        "width": 12, "batches": lambda epoch: [data], "validation": lambda: [data], "steps_per_epoch": 1,
        "num_classes": 3, "process": ALONE, "say": [].append,
    }  # fmt: skip
    with pytest.raises(UserError, match="from 0 to 3 are not the 3 classes"):
        attentive_probe(lambda tokens: tokens, **common)
    with pytest.raises(UserError, match="5 attention heads do not divide a width of 12"):
        attentive_probe(lambda tokens: tokens, **common, num_heads=5)
    with pytest.raises(UserError, match="has no heads"):
        attentive_probe(lambda tokens: tokens, **common, lrs=())
    with pytest.raises(UserError, match="0 steps an epoch trains nothing"):
        attentive_probe(lambda tokens: tokens, **(common | {"steps_per_epoch": 0}))
    broken = torch.full((4, 3, 12), float("nan")), data[1]
    with pytest.raises(UserError, match="attentive probe diverged in epoch 1"):
        attentive_probe(lambda tokens: tokens, **(common | {"num_classes": 4, "batches": lambda epoch: [broken]}))
    with pytest.raises(UserError, match="no validation images"):
        attentive_probe(lambda tokens: tokens, **(common | {"num_classes": 4, "validation": list}))


def test_tokens_that_do_not_fit_into_memory_are_refused_at_once():
    module = VisionTransformer((16, 16), 4, Dimensions(8, 1, 1))
    encoder = Encoder("trained", 0, 8, {}, small_pixels, module=module)
    few = {"train": np.arange(5), "validation": np.arange(3)}
    check_cached(setting_of(few), encoder)
    many = {"train": np.arange(3), "validation": np.broadcast_to(0, 2**40)}  # 0 bytes as a view
    with pytest.raises(UserError, match=r"would hold the tokens of 1099511627779 images.*: leave out --cached"):
        check_cached(setting_of(many), encoder)


def setting_of(samples: dict[str, np.ndarray]) -> Setting:
    return Setting(data=SimpleNamespace(samples=samples, image_size=(16, 16)), process=ALONE, seed=0)
