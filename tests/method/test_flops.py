"""The operations of a training step by formula are those that torch counts in the networks themselves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ijepa_ds.method.encoder import Dimensions, VisionTransformer, dimensions_of, set_attention
from ijepa_ds.method.flops import Shapes
from ijepa_ds.method.predictor import Predictor

GRID, PATCH, BATCH, CONTEXT, TARGETS, TOKENS = (6, 6), 4, 3, 10, 4, 6
ENCODER = Dimensions(24, 3, 2, 100)


def counted(call) -> float:
    """Operations of one image, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops() / BATCH


@pytest.mark.parametrize("depth", [2, 3])  # an only block has queries of the context that nobody needs
def test_the_counts_are_those_of_the_networks(depth: int) -> None:
    encoder = VisionTransformer((24, 24), PATCH, ENCODER)
    predictor = Predictor(GRID, ENCODER.width, width=16, depth=depth, heads=2)
    for part in (encoder, predictor):
        set_attention(part, fused=False)  # products that the counter knows on every device
    images = torch.randn(BATCH, 3, 24, 24)
    context = torch.rand(BATCH, 36).argsort(1)[:, :CONTEXT]
    blocks = torch.rand(TARGETS, BATCH, 36).argsort(2)[..., :TOKENS]
    features = torch.randn(BATCH, CONTEXT, ENCODER.width, requires_grad=True)

    def target() -> None:
        with torch.no_grad():
            encoder.features_at(images, blocks)

    flops = Shapes(ENCODER, Dimensions(16, depth, 2), PATCH, 36).flops(
        context_tokens=CONTEXT, target_tokens=TOKENS, num_targets=TARGETS
    )
    assert counted(target) == flops.target
    assert counted(lambda: encoder(images, context).sum().backward()) == flops.context_encoder
    assert counted(lambda: predictor(features, context, blocks).sum().backward()) == flops.predictor


def vit_h(**changes: float) -> dict[str, float]:
    shapes = Shapes(dimensions_of("huge"), Dimensions(384, 12, 16), 14, 256)
    flops = shapes.flops(**{"context_tokens": 72, "target_tokens": 45, **changes})
    return {"target": flops.target, "context encoder": flops.context_encoder, "predictor": flops.predictor}


def test_vit_h_by_hand() -> None:
    # A block is 24 D^2 operations a token (4 D^2 weights of attention, 8 D^2 of the MLP, two each), 4 n D of attention.
    block = 24 * 1280**2 * 256 + 4 * 256**2 * 1280
    embedding = 2 * 256 * 588 * 1280
    plain = vit_h(exact_savings=False)
    assert plain["target"] == 32 * block + embedding
    assert sum(plain.values()) == pytest.approx(672e9, rel=2e-3)  # "276 ms at the peak of an A100 for 128 images"
    assert plain["predictor"] == pytest.approx(63e9, rel=1e-2)


def test_the_exact_savings_by_hand() -> None:
    saved = {name: value - vit_h()[name] for name, value in vit_h(exact_savings=False).items()}
    # The target's last block: queries, output and MLP (2 + 8 D^2 weights) of 256 - 180 tokens, and their attention.
    assert saved["target"] == 2 * 1280 * (256 - 180) * (10 * 1280 + 2 * 256)
    assert saved["context encoder"] == 2 * (2 * (256 - 72) * 588 * 1280)
    last = 4 * 2 * 384 * 72 * (10 * 384 + 2 * 117)
    first = 3 * 2 * 72 * 3 * 384**2
    assert saved["predictor"] == 3 * (last + first)


def test_targets_that_cover_the_image_save_nothing_in_the_target_encoder() -> None:
    assert vit_h(target_tokens=70)["target"] == vit_h(exact_savings=False)["target"]


def test_the_total_is_the_sum() -> None:
    flops = Shapes(ENCODER, Dimensions(16, 1, 2), PATCH, 36).flops(context_tokens=10, target_tokens=6)
    assert flops.total == flops.target + flops.context_encoder + flops.predictor


@pytest.mark.parametrize("contexts", [2, 3])
def test_contexts_share_their_images_target_pass(contexts: int) -> None:
    encoder = VisionTransformer((24, 24), PATCH, ENCODER)
    set_attention(encoder, fused=False)
    images = torch.randn(BATCH, 3, 24, 24)
    context = torch.rand(contexts * BATCH, 36).argsort(1)[:, :CONTEXT]
    blocks = torch.rand(contexts * TARGETS, BATCH, 36).argsort(2)[..., :TOKENS]
    shapes = Shapes(ENCODER, Dimensions(16, 2, 2), PATCH, 36)
    flops = shapes.flops(context_tokens=CONTEXT, target_tokens=TOKENS, num_targets=TARGETS, contexts=contexts)
    one = shapes.flops(context_tokens=CONTEXT, target_tokens=TOKENS, num_targets=TARGETS)

    def target() -> None:
        with torch.no_grad():
            encoder.features_at(images, blocks)

    assert counted(target) == flops.target
    assert counted(lambda: encoder(images, context).sum().backward()) == flops.context_encoder
    assert flops.predictor == contexts * one.predictor


def test_a_second_context_saves_a_quarter_of_vit_h() -> None:
    shapes = Shapes(dimensions_of("huge"), Dimensions(384, 12, 16), 14, 256)
    one, two = (shapes.flops(context_tokens=72, target_tokens=45, contexts=count).total for count in (1, 2))
    assert two / 2 / one == pytest.approx(0.753, abs=0.001)
