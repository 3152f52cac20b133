"""The method's parts against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.ijepa import IJEPA, normalize_images, prediction_loss, select_targets
from ijepa_ds.method.predictor import Predictor

IMAGE_SIZE, PATCH, GRID = (16, 24), 4, (4, 6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> IJEPA:
    encoder = VisionTransformer(IMAGE_SIZE, PATCH, Dimensions(16, 1, 2), generator=generator())
    ijepa = IJEPA(encoder, Predictor(GRID, 16, width=8, depth=1, heads=2, generator=generator()))
    for weight in ijepa.parameters():
        if weight.requires_grad and weight.ndim > 1:
            weight.data *= 20  # initial weights are so small that the blocks hardly matter
    return ijepa


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """images [2, 3, 16, 24], context_block [2, 5], target_blocks [3, 2, 4]."""
    orders = [torch.randperm(24, generator=generator(n)) for n in range(8)]
    images = torch.randn(2, 3, *IMAGE_SIZE, generator=generator(5))
    context_block = torch.stack([order[:5] for order in orders[:2]])
    return images, context_block, torch.stack([order[:4] for order in orders[2:]]).reshape(3, 2, 4)


def test_the_loss_is_the_mean_of_smooth_l1():
    """d^2 / 2 below 1, |d| - 1/2 above: one number at a time, in double precision."""
    predictions = torch.randn(6, 4, 8, generator=generator(0)) * 2
    targets = torch.randn(6, 4, 8, generator=generator(1))
    differences = np.abs((predictions - targets).double().numpy())
    assert (differences > 1).any() and (differences < 1).any()
    expected = np.where(differences < 1, differences**2 / 2, differences - 0.5).mean()
    assert prediction_loss(predictions, targets).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_bf16_predictions_is_computed_in_fp32():
    predictions = torch.randn(6, 4, 8, generator=generator(0)).bfloat16()
    targets = torch.randn(6, 4, 8, generator=generator(1))
    loss = prediction_loss(predictions, targets)
    assert loss.dtype == torch.float32
    assert loss == prediction_loss(predictions.float(), targets)


@torch.no_grad()
def test_the_forward_pass_is_encoder_predictor_and_loss(model, batch):
    images, context_block, target_blocks = batch
    targets = torch.randn(6, 4, 16, generator=generator(7))
    context = model.context_encoder(images)  # all patches: not what the predictor may see
    predictions = model.predict(images, context_block, target_blocks)
    assert predictions.shape == (6, 4, 16)
    assert torch.equal(
        predictions, model.predictor(model.context_encoder(images, context_block), context_block, target_blocks)
    )
    leaking = model.predictor(
        context.gather(1, context_block[..., None].expand(-1, -1, 16)), context_block, target_blocks
    )
    assert not torch.allclose(predictions, leaking, rtol=1e-3)
    assert model(*batch, targets) == prediction_loss(predictions, targets)


def test_the_loss_reaches_every_trainable_weight(model, batch):
    model(*batch, torch.randn(6, 4, 16, generator=generator(7))).backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without == {"context_encoder.pos_embed", "predictor.predictor_pos_embed"}


def test_targets_are_block_major_normalised_and_of_the_asked_patches():
    features = torch.randn(2, 24, 16, generator=generator(2)) * 5 + 3
    blocks = torch.randint(24, (3, 2, 4), generator=generator(3))
    targets = select_targets(features, blocks)
    assert targets.shape == (6, 4, 16) and targets.dtype == torch.float32
    for m in range(3):
        for b in range(2):
            for t in range(4):
                vector = features[b, blocks[m, b, t]].double()
                expected = (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt()
                torch.testing.assert_close(targets[m * 2 + b, t].double(), expected, rtol=1e-5, atol=1e-6)


def test_normalising_after_the_selection_is_normalising_before_it():
    """The reference normalises all patches, then selects."""
    features = torch.randn(2, 24, 16, generator=generator(2)) * 0.01  # so small that eps matters
    blocks = torch.randint(24, (3, 2, 4), generator=generator(3))
    normalised = torch.nn.functional.layer_norm(features, (16,))
    for m in range(3):
        for b in range(2):
            torch.testing.assert_close(select_targets(features, blocks)[m * 2 + b], normalised[b, blocks[m, b]])


def test_targets_of_bf16_features_are_normalised_in_fp32():
    features = (torch.randn(2, 24, 16, generator=generator(2)) + 20).bfloat16()
    blocks = torch.randint(24, (3, 2, 4), generator=generator(3))
    assert torch.equal(select_targets(features, blocks), select_targets(features.float(), blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_normalised_per_channel_and_turned_channels_first(dtype):
    pixels = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8, generator=generator(0))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    images = normalize_images(pixels, mean=mean, std=std, dtype=dtype)
    assert images.shape == (2, 3, 4, 6) and images.dtype == dtype
    for channel, (m, s) in enumerate([(0.4, 0.1), (0.5, 0.2), (0.6, 0.3)]):
        expected = torch.from_numpy((pixels[..., channel].numpy() / 255.0 - m) / s)
        torch.testing.assert_close(
            images[:, channel], expected.to(dtype), rtol=1e-5 if dtype.itemsize == 4 else 1e-2, atol=1e-5
        )
