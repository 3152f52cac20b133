"""The encoder against timm's own vision transformer, and what selection, checkpointing and initialisation promise."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from ijepa_ds.errors import UserError
from ijepa_ds.method.blocks import select_tokens
from ijepa_ds.method.encoder import (
    NAMED_DIMENSIONS,
    Dimensions,
    VisionTransformer,
    dimensions_of,
    initialize,
    set_attention,
)
from ijepa_ds.method.positions import sine_cosine_positions

SMALL = Dimensions(width=32, depth=3, heads=4, hidden=80)
IMAGE_SIZE, PATCH = (16, 24), 4  # 4 x 6 patches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**more) -> VisionTransformer:
    return VisionTransformer(IMAGE_SIZE, PATCH, SMALL, generator=generator(), **more)


def widened(module: nn.Module) -> nn.Module:
    """The module with every trainable weight drawn anew and large, so that nothing hides behind zeros and ones."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator(weight.numel())) * 0.2)
    return module


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    return widened(make())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, *IMAGE_SIZE, generator=generator(1))


@pytest.fixture(scope="module")
def timms(encoder) -> TimmVisionTransformer:
    """timm's model with the same weights, loaded strictly under the same names."""
    model = TimmVisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_ratio=2.5,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    )
    model.load_state_dict(encoder.state_dict(), strict=True)
    return model.eval()


# ------------------------------------------------------------------------------------------- the forward pass


@torch.no_grad()
def test_features_are_timms(encoder, timms, images):
    features = encoder(images)
    assert features.shape == (3, 24, 32)
    torch.testing.assert_close(features, timms.forward_features(images))


@torch.no_grad()
def test_features_of_the_last_blocks_are_timms_intermediates(encoder, timms, images):
    for blocks_out in (2, 3):
        ours = encoder(images, blocks_out=blocks_out)
        theirs = timms.forward_intermediates(
            images, indices=blocks_out, norm=True, output_fmt="NLC", intermediates_only=True
        )
        assert len(ours) == len(theirs) == blocks_out
        for mine, its in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, its)
        torch.testing.assert_close(ours[-1], encoder(images))
    for blocks_out in (0, len(encoder.blocks) + 1):
        with pytest.raises(ValueError, match="from 1 to the encoder's"):
            encoder(images, blocks_out=blocks_out)


@torch.no_grad()
def test_all_patches_selected_in_another_order_give_the_same_features_in_that_order(encoder, images):
    order = torch.stack([torch.randperm(24, generator=generator(n)) for n in range(3)])
    torch.testing.assert_close(encoder(images, order), select_tokens(encoder(images), order))


@torch.no_grad()
def test_selection_is_attention_that_sees_the_selected_patches_only(encoder, images):
    """Against the same blocks on all patches, with every other patch masked out of the attention."""
    indices = torch.stack([torch.randperm(24, generator=generator(n))[:7] for n in range(3)])
    visible = torch.zeros(3, 24, dtype=torch.bool).scatter(1, indices, True)
    tokens = encoder.patch_embed(images) + encoder.pos_embed
    for block in encoder.blocks:
        query, key, value = block.attn.qkv(block.norm1(tokens)).reshape(3, 24, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~visible[:, None, None], -torch.inf)
        tokens = tokens + block.attn.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(3, 24, 32))
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(encoder(images, indices), select_tokens(encoder.norm(tokens), indices))


@torch.no_grad()
def test_pixels_outside_of_the_selection_change_nothing(encoder, images):
    indices = torch.tensor([[0, 1, 7]] * 3)
    changed = images.clone()
    changed[:, :, 8:] = 9  # the two lower rows of patches
    assert torch.equal(encoder(images, indices), encoder(changed, indices))
    assert not torch.allclose(encoder(images), encoder(changed))


@torch.no_grad()
@pytest.mark.parametrize("target_tokens", [1, 6, 9], ids=["few", "as many as there are", "more than there are"])
@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "fused"])
def test_features_at_target_blocks_are_those_of_all_patches_there_block_major(images, target_tokens, fused):
    encoder = widened(make())
    set_attention(encoder, fused=fused)
    blocks = torch.randint(24, (4, 3, target_tokens), generator=generator(2))
    features, found = encoder(images), encoder.features_at(images, blocks)
    assert found.shape == (12, target_tokens, 32)
    for m in range(4):
        for b in range(3):
            torch.testing.assert_close(found[m * 3 + b], features[b, blocks[m, b]])


@torch.no_grad()
def test_the_last_block_computes_no_more_than_the_target_blocks(encoder, images):
    """Counted: tokens through the first layer of each MLP."""
    rows = []
    hooks = [b.mlp.fc1.register_forward_hook(lambda _, __, out: rows.append(out.shape[1])) for b in encoder.blocks]
    encoder.features_at(images, torch.randint(24, (2, 3, 5), generator=generator(2)))
    for hook in hooks:
        hook.remove()
    assert rows == [24, 24, 10]


@torch.no_grad()
def test_autocast_rounds_the_selected_products_as_it_rounds_the_whole_ones(encoder, images):
    blocks = torch.randint(24, (2, 3, 5), generator=generator(2))
    with torch.autocast("cpu", torch.bfloat16):
        whole, found = encoder(images), encoder.features_at(images, blocks)
        all_patches = encoder(images, torch.arange(24).expand(3, -1))
    assert (found - encoder.features_at(images, blocks)).abs().max() > 1e-3  # it is on
    torch.testing.assert_close(found, whole[torch.arange(3)[:, None], blocks].flatten(0, 1), rtol=0.02, atol=0.02)
    torch.testing.assert_close(all_patches, whole, rtol=0.02, atol=0.02)


def test_images_of_another_shape_are_refused(encoder):
    """Whatever the number of patches."""
    for shape in (IMAGE_SIZE[::-1], (24, 24)):
        with pytest.raises((ValueError, AssertionError), match=str(shape[0])):
            encoder(torch.zeros(1, 3, *shape), torch.tensor([[0, 1]]))


@torch.no_grad()
def test_patches_carry_their_own_position(encoder):
    """The same pixels everywhere: the features of two patches differ by their positions alone."""
    features = encoder(torch.ones(1, 3, *IMAGE_SIZE))[0]
    assert torch.pdist(features).min() > 1e-3


def test_select_tokens_takes_each_images_own_indices():
    tokens = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    selected = select_tokens(tokens, torch.tensor([[4, 0], [1, 1]]))
    assert torch.equal(selected, torch.stack([tokens[0, [4, 0]], tokens[1, [1, 1]]]))


def test_both_kinds_of_attention_give_the_same_features(images):
    encoder = widened(make())
    set_attention(encoder, fused=True)
    fused = encoder(images)
    assert all(block.attn.fused_attn for block in encoder.blocks)
    set_attention(encoder, fused=False)
    assert not any(block.attn.fused_attn for block in encoder.blocks)
    torch.testing.assert_close(encoder(images), fused)


def test_activation_checkpointing_changes_neither_features_nor_gradients(images):
    indices = torch.tensor([[0, 5, 9, 23]] * 3)
    results, computed = [], []
    for checkpointing in (False, True):
        encoder = widened(make(activation_checkpointing=checkpointing))
        for block in encoder.blocks:
            block.register_forward_pre_hook(lambda *_: computed.append(1))
        computed.clear()
        features = encoder(images, indices)
        features.square().sum().backward()
        results.append((len(computed), features, [weight.grad for weight in encoder.parameters()]))
    (plain, features, gradients), (again, same_features, same_gradients) = results
    assert (plain, again) == (3, 6)  # each block is really computed twice
    assert torch.equal(features, same_features)
    assert sum(gradient is None for gradient in gradients) == 1  # the positions
    for gradient, same in zip(gradients, same_gradients, strict=True):
        assert gradient is same is None or torch.equal(gradient, same)


# ------------------------------------------------------------------------------------------- sizes


def test_named_dimensions_are_the_released_codes():
    table = {name: (d.width, d.depth, d.heads) for name, d in NAMED_DIMENSIONS.items()}
    assert table == {
        "tiny": (192, 12, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
        "huge": (1280, 32, 16),
        "giant": (1408, 40, 16),
    }
    assert all(dimensions_of(name) == dimensions for name, dimensions in NAMED_DIMENSIONS.items())
    assert {d.hidden / d.width for name, d in NAMED_DIMENSIONS.items() if name != "giant"} == {4.0}


def test_the_mlps_have_the_hidden_width_that_is_asked_for():
    assert Dimensions(32, 1, 1) == Dimensions(32, 1, 1, 128)
    for width in (12, 36, 1408):
        for hidden in (1, 7, 47, 143, 4 * width, 6143, 6999):
            with torch.device("meta"):
                encoder = VisionTransformer((8, 8), 8, Dimensions(width, 1, 1, hidden))
            assert encoder.blocks[0].mlp.fc1.out_features == hidden


@pytest.mark.parametrize(
    ("name", "size", "patch", "millions"),
    [("huge", (224, 224), 14, 630.8), ("huge", (448, 448), 16, 630.9), ("giant", (224, 224), 16, 1011.4)],
)
def test_the_large_models_have_their_number_of_parameters(name, size, patch, millions):
    """630.8 M as the paper's ViT-H/14, without class token and head; on the meta device, so no memory is needed."""
    with torch.device("meta"):
        encoder = VisionTransformer(size, patch, dimensions_of(name))
    trainable = sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad)
    assert trainable / 1e6 == pytest.approx(millions, abs=0.6)
    if name == "giant":
        assert encoder.blocks[0].mlp.fc1.weight.shape == (6144, 1408)


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("vit_small_patch16_224", Dimensions(384, 12, 6, 1536)),
        ("vit_huge_patch14_gap_224", Dimensions(1280, 32, 16, 5120)),
        ("vit_giant_patch16_gap_224", Dimensions(1408, 40, 16, 6144)),
    ],
)
def test_names_of_timm_give_timms_dimensions(name, dimensions):
    assert dimensions_of(name) == dimensions


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hugo", "neither one of tiny, small, base, large, huge, giant nor a model of timm"),
        ("resnet18", "not a plain ViT of timm"),
        ("vit_base_patch14_dinov2", "not a plain ViT of timm"),  # layer scale
        ("vit_base_patch16_clip_224", None),
    ],
)
def test_other_names_are_refused_or_plain(name, reason):
    if reason is None:  # differs in its head and norms' eps alone
        assert dimensions_of(name) == NAMED_DIMENSIONS["base"]
        return
    with pytest.raises(UserError, match=reason) as refusal:
        dimensions_of(name)
    assert f"model.encoder = '{name}'" in str(refusal.value)


# ------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_have_std_002_biases_0_and_norms_1():
    """Every Linear and the patch embedding alike, whatever the layer: see the table of METHOD's defects."""
    encoder = VisionTransformer((32, 32), 8, Dimensions(width=128, depth=2, heads=4), generator=generator())
    for name, weight in encoder.named_parameters():
        if name == "pos_embed":
            assert torch.equal(weight, sine_cosine_positions(128, (4, 4))[None]) and not weight.requires_grad
        elif name.endswith("bias"):
            assert (weight == 0).all()
        elif "norm" in name:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.03), name
            assert abs(weight.mean()) < 0.0005 and len(weight.unique()) > 0.9 * weight.numel()


def test_layer_norms_have_eps_1e_6_and_attention_has_a_bias():
    encoder = make()
    assert {part.eps for part in encoder.modules() if isinstance(part, nn.LayerNorm)} == {1e-6}
    assert all(block.attn.qkv.bias is not None for block in encoder.blocks)
    assert not any("cls" in name or "head" in name or "fc_norm" in name for name in encoder.state_dict())


def test_initial_weights_are_a_function_of_the_generator():
    def weights(seed: int) -> torch.Tensor:
        encoder = VisionTransformer(IMAGE_SIZE, PATCH, SMALL, generator=generator(seed))
        return torch.cat([weight.flatten() for weight in encoder.parameters()])

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


def test_a_trainable_parameter_that_no_rule_reaches_is_an_error():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(3))

    with pytest.raises(AssertionError, match=r"no initialisation is known for Scale: \['gamma'\]"):
        initialize(nn.Sequential(nn.Linear(2, 2), Scale()))
    frozen = Scale()
    frozen.gamma.requires_grad = False
    initialize(frozen)
    assert (frozen.gamma == 1).all()
