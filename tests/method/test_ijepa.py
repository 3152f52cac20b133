"""The method's parts against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_ds.method.encoder import Dimensions, VisionTransformer, set_attention
from ijepa_ds.method.ijepa import IJEPA, mean_of_layers, normalize_images, normalize_targets, prediction_loss
from ijepa_ds.method.masks import MultiblockSampler
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.method.vicreg import VarianceCovariance

IMAGE_SIZE, PATCH, GRID, WIDTH = (24, 32), 4, (6, 8), 16


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
    """images [2, 3, 24, 32], context_block [2, 5], target_blocks [3, 2, 4]."""
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


def test_targets_are_normalised_over_features_without_affine():
    features = torch.randn(6, 4, 16, generator=generator(2)) * 0.01 + 3  # so small that eps matters
    targets = normalize_targets(features)
    for vector, target in zip(features.double().view(-1, 16), targets.view(-1, 16), strict=True):
        expected = (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(target.double(), expected, rtol=1e-5, atol=1e-4)


def test_targets_of_bf16_features_are_normalised_in_fp32():
    features = (torch.randn(6, 4, 16, generator=generator(2)) + 20).bfloat16()
    targets = normalize_targets(features)
    assert targets.dtype == torch.float32 and torch.equal(targets, normalize_targets(features.float()))


# ------------------------------------------------------------------------------------------- nothing left out


def plain_loss(model: IJEPA, target: VisionTransformer, images, context_block, target_blocks) -> torch.Tensor:
    """The method written plainly, as the released code has it: convolve and normalise all, then select and repeat."""

    def features(encoder: VisionTransformer, kept: torch.Tensor | None) -> torch.Tensor:
        convolution = encoder.patch_embed.proj
        tokens = F.conv2d(images, convolution.weight, convolution.bias, stride=PATCH).flatten(2).transpose(1, 2)
        tokens = tokens + encoder.pos_embed
        tokens = tokens if kept is None else torch.stack([row[k] for row, k in zip(tokens, kept, strict=True)])
        for block in encoder.blocks:
            tokens = block(tokens)
        return encoder.norm(tokens)

    predictor = model.predictor
    positions = predictor.predictor_pos_embed[0]
    num_targets, num_images, target_tokens = target_blocks.shape
    with torch.no_grad():
        normalised = F.layer_norm(features(target, None), (WIDTH,))
        blocks = [normalised[b, target_blocks[m, b]] for m in range(num_targets) for b in range(num_images)]
        targets = torch.stack(blocks)
    context = predictor.predictor_embed(features(model.context_encoder, context_block)) + positions[context_block]
    masked = predictor.mask_token + positions[target_blocks.flatten(0, 1)]
    tokens = torch.cat([context.repeat(num_targets, 1, 1), masked], dim=1)
    for block in predictor.predictor_blocks:
        tokens = block(tokens)
    predictions = predictor.predictor_proj(predictor.predictor_norm(tokens))[:, -target_tokens:]
    return F.smooth_l1_loss(predictions, targets)


def large_weights(module: torch.nn.Module, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    for number, weight in enumerate(module.parameters()):
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, generator=generator(seed + number), dtype=torch.float64) * 0.25
    return module.to(dtype)


def networks(depths: tuple[int, int], dtype: torch.dtype, checkpointing: bool = False) -> tuple:
    """A model and a target encoder with other weights."""
    size, more = Dimensions(WIDTH, depths[0], 2), {"activation_checkpointing": checkpointing}
    encoder, target = (VisionTransformer(IMAGE_SIZE, PATCH, size, **more) for _ in range(2))
    predictor = Predictor(GRID, WIDTH, width=8, depth=depths[1], heads=2, **more)
    model = large_weights(IJEPA(encoder, predictor), dtype, 100)
    return model, large_weights(target, dtype, 500).requires_grad_(False)


def masks_of(grid: tuple[int, int], step: int, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    sampler = MultiblockSampler(seed=3, grid=grid, context_tokens=4)
    drawn = [sampler.draw(step, sample) for sample in range(num_images)]
    context_block = torch.from_numpy(np.stack([context for context, _ in drawn])).long()
    return context_block, torch.from_numpy(np.stack([blocks for _, blocks in drawn], axis=1)).long()


def loss_and_gradients(loss: torch.Tensor, model: IJEPA) -> dict[str, torch.Tensor]:
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {"loss": loss.detach(), **dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))}


def our_loss(model: IJEPA, target: VisionTransformer, images, context_block, target_blocks) -> torch.Tensor:
    with torch.no_grad():
        features = target.features_at(images, target_blocks)
    if images.dtype == torch.float64:  # which the loss would round to fp32
        return F.smooth_l1_loss(model.predict(images, context_block, target_blocks), F.layer_norm(features, (WIDTH,)))
    return model(images, context_block, target_blocks, normalize_targets(features))


def assert_same(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, expected in plain.items():
        assert expected.abs().max() > 0, name
        difference = float((ours[name] - expected).norm() / expected.norm())
        assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize("depths", [(1, 1), (1, 2), (2, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_loss_and_gradients_are_those_of_the_method_written_plainly(depths, fused, checkpointing):
    """In double precision, where a difference that is not rounding shows."""
    model, target = networks(depths, torch.float64, checkpointing)
    set_attention(model, fused=fused)
    set_attention(target, fused=fused)
    images = torch.randn(3, 3, *IMAGE_SIZE, generator=generator(5), dtype=torch.float64)
    for step in range(3):
        batch = (images, *masks_of(GRID, step, 3))
        plain = loss_and_gradients(plain_loss(model, target, *batch), model)
        assert_same(loss_and_gradients(our_loss(model, target, *batch), model), plain, 1e-12)


def test_the_same_in_single_precision():
    model, target = networks((3, 3), torch.float32)
    images = torch.randn(3, 3, *IMAGE_SIZE, generator=generator(5))
    target_tokens = set()
    for step in range(6):
        batch = (images, *masks_of(GRID, step, 3))
        target_tokens.add(batch[2].shape[2])
        plain = loss_and_gradients(plain_loss(model, target, *batch), model)
        assert_same(loss_and_gradients(our_loss(model, target, *batch), model), plain, 1e-6)
    assert len(target_tokens) > 1


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


# ------------------------------------------------------------------------------------------------------------- options


@torch.no_grad()
def test_targets_of_several_layers_are_the_mean_of_their_normalised_features(model, batch):
    images, _, target_blocks = batch
    encoder = VisionTransformer(IMAGE_SIZE, PATCH, Dimensions(16, 3, 2), generator=generator())
    whole = encoder(images, blocks_out=2)
    layers = encoder.layers_at(images, target_blocks, 2)
    for every, at in zip(whole, layers, strict=True):
        for m, block in enumerate(target_blocks):
            for b in range(2):
                assert torch.allclose(at[2 * m + b], every[b, block[b]], atol=1e-5)
    expected = (F.layer_norm(layers[0], (16,)) + F.layer_norm(layers[1], (16,))) / 2
    assert torch.allclose(mean_of_layers(layers), expected, atol=1e-6)
    assert torch.equal(mean_of_layers(layers[1:]), normalize_targets(layers[1]))


def test_what_regularises_is_added_to_the_loss(model, batch):
    targets = torch.randn(6, 4, 16, generator=generator(7))
    plain = model(*batch, targets)
    model.regulariser = VarianceCovariance(16, hidden=8, group=2, variance=2.0, covariance=1.0, generator=generator())
    added = model.regulariser(model.context_encoder(*batch[:2]))
    assert added > 0 and model(*batch, targets).item() == pytest.approx((plain + added).item(), rel=1e-6)


@torch.no_grad()
def test_two_contexts_of_an_image_are_two_images_with_one_each(model, batch):
    images, context_block, target_blocks = batch
    again, other = context_block.flip(0), target_blocks.flip(1)
    both = torch.cat([context_block, again]), torch.cat([target_blocks, other], dim=1)
    targets = torch.randn(12, 4, 16, generator=generator(7))  # [3 * (2 * 2), 4, 16]
    first, second = targets.view(3, 2, 2, 4, 16).unbind(1)
    apart = (
        model(images, context_block, target_blocks, first.flatten(0, 1)),
        model(images, again, other, second.flatten(0, 1)),
    )
    assert model(images, *both, targets).item() == pytest.approx(sum(apart).item() / 2, rel=1e-6)
