"""The predictor against a loop over target blocks and images, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from ijepa_ds.method.noise import gaussian
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.method.predictor import Predictor

GRID, WIDTH = (4, 6), 24  # 24 patches; encoder width
B, K, M, T = 3, 5, 4, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**more) -> Predictor:
    predictor = Predictor(GRID, WIDTH, **{"width": 16, "depth": 2, "heads": 2, "generator": generator(0), **more})
    with torch.no_grad():
        for weight in predictor.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator(weight.numel())) * 0.3)
    return predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """context [B, K, D], context_block [B, K], target_blocks [M, B, T]: other patches for each image and block."""
    orders = [torch.randperm(24, generator=generator(n)) for n in range(B + M * B)]
    context_block = torch.stack([order[:K] for order in orders[:B]])
    target_blocks = torch.stack([order[:T] for order in orders[B:]]).reshape(M, B, T)
    return torch.randn(B, K, WIDTH, generator=generator(9)), context_block, target_blocks


def loop(predictor: Predictor, context, context_block, target_blocks) -> torch.Tensor:
    """[M, B, T, D]: each target block of each image as a sequence of its own."""
    positions = sine_cosine_positions(16, GRID)
    result = torch.empty(M, B, T, WIDTH)
    for m in range(M):
        for b in range(B):
            seen = predictor.predictor_embed(context[b]) + positions[context_block[b]]
            masked = torch.stack([predictor.mask_token[0, 0] + positions[patch] for patch in target_blocks[m, b]])
            tokens = torch.cat([seen, masked])[None]
            for block in predictor.predictor_blocks:
                tokens = block(tokens)
            result[m, b] = predictor.predictor_proj(predictor.predictor_norm(tokens))[0, K:]
    return result


@torch.no_grad()
def test_predictions_are_those_of_a_loop_block_major(predictor, inputs):
    predictions = predictor(*inputs)
    assert predictions.shape == (M * B, T, WIDTH)
    expected = loop(predictor, *inputs)
    for m in range(M):
        for b in range(B):
            torch.testing.assert_close(predictions[m * B + b], expected[m, b])


@torch.no_grad()
def test_a_target_block_does_not_see_the_others(predictor, inputs):
    context, context_block, target_blocks = inputs
    before = predictor(*inputs).reshape(M, B, T, WIDTH)
    changed = target_blocks.clone()
    changed[2] = (changed[2] + 1) % 24
    after = predictor(context, context_block, changed).reshape(M, B, T, WIDTH)
    torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]])
    assert ((after[2] - before[2]).abs().amax(dim=(1, 2)) > 1e-3).all()


@torch.no_grad()
def test_an_image_does_not_see_the_others(predictor, inputs):
    context, context_block, target_blocks = inputs
    before = predictor(*inputs).reshape(M, B, T, WIDTH)
    changed = context.clone()
    changed[1] += 1
    after = predictor(changed, context_block, target_blocks).reshape(M, B, T, WIDTH)
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]])
    assert ((after[:, 1] - before[:, 1]).abs().amax(dim=(1, 2)) > 1e-3).all()


@torch.no_grad()
def test_positions_of_context_and_target_matter(predictor, inputs):
    context, context_block, target_blocks = inputs
    before = predictor(*inputs)
    moved_context = predictor(context, (context_block + 1) % 24, target_blocks)
    assert (moved_context - before).abs().max() > 1e-2
    assert torch.pdist(before[0]).min() > 1e-3  # mask tokens differ by their position alone


@torch.no_grad()
def test_tokens_are_sets_the_order_of_context_or_targets_does_not_matter(predictor, inputs):
    context, context_block, target_blocks = inputs
    before = predictor(*inputs)
    torch.testing.assert_close(predictor(context.flip(1), context_block.flip(1), target_blocks), before)
    torch.testing.assert_close(predictor(context, context_block, target_blocks.flip(2)), before.flip(1))


@torch.no_grad()
def test_the_last_block_computes_mask_tokens_only_and_the_first_the_context_once_an_image(predictor, inputs):
    """Counted: tokens through queries, keys and values of the first block, and the last one's MLP."""
    counts = {"first qkv": 0, "last mlp": 0}

    def count(name: str, out: torch.Tensor) -> None:
        counts[name] += out[..., 0].numel()

    first, last = predictor.predictor_blocks[0], predictor.predictor_blocks[-1]
    hooks = [
        first.attn.qkv.register_forward_hook(lambda _, __, out: count("first qkv", out)),
        last.mlp.fc1.register_forward_hook(lambda _, __, out: count("last mlp", out)),
    ]
    predictor(*inputs)
    for hook in hooks:
        hook.remove()
    assert counts == {"first qkv": B * K + M * B * T, "last mlp": M * B * T}


def test_activation_checkpointing_changes_neither_predictions_nor_gradients(inputs):
    results = []
    for checkpointing in (False, True):
        predictor = make(activation_checkpointing=checkpointing)
        predictions = predictor(*inputs)
        predictions.square().sum().backward()
        results.append((predictions, [weight.grad for weight in predictor.parameters() if weight.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_every_trainable_weight_learns_and_the_positions_do_not(inputs):
    predictor = make()
    predictor(*inputs).square().sum().backward()
    frozen = [name for name, weight in predictor.named_parameters() if not weight.requires_grad]
    assert frozen == ["predictor_pos_embed"]
    for name, weight in predictor.named_parameters():
        assert name in frozen or weight.grad.abs().sum() > 0, name


def test_initial_weights_and_names_are_the_released_codes():
    predictor = Predictor((8, 8), 64, width=48, depth=2, heads=2, generator=generator(0))
    shapes = {name: tuple(weight.shape) for name, weight in predictor.state_dict().items() if "blocks.1" not in name}
    block = "predictor_blocks.0."
    assert shapes == {
        "mask_token": (1, 1, 48),
        "predictor_pos_embed": (1, 64, 48),
        "predictor_embed.weight": (48, 64),
        "predictor_embed.bias": (48,),
        f"{block}norm1.weight": (48,),
        f"{block}norm1.bias": (48,),
        f"{block}attn.qkv.weight": (144, 48),
        f"{block}attn.qkv.bias": (144,),
        f"{block}attn.proj.weight": (48, 48),
        f"{block}attn.proj.bias": (48,),
        f"{block}norm2.weight": (48,),
        f"{block}norm2.bias": (48,),
        f"{block}mlp.fc1.weight": (192, 48),
        f"{block}mlp.fc1.bias": (192,),
        f"{block}mlp.fc2.weight": (48, 192),
        f"{block}mlp.fc2.bias": (48,),
        "predictor_norm.weight": (48,),
        "predictor_norm.bias": (48,),
        "predictor_proj.weight": (64, 48),
        "predictor_proj.bias": (64,),
    }
    for name, weight in predictor.named_parameters():
        if name == "predictor_pos_embed":
            assert torch.equal(weight[0], sine_cosine_positions(48, (8, 8)))
        elif name.endswith("bias"):
            assert (weight == 0).all()
        elif "norm" in name:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.35 if name == "mask_token" else 0.06), name
    norms = [part for part in predictor.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert {part.eps for part in norms} == {1e-6} and len(norms) == 5


# -------------------------------------------------------------------------------------------- stochastic positions


@torch.no_grad()
def test_noise_goes_through_the_weights_that_project_the_context(inputs):
    """StoP's m_i = A n_i + position + mask token, written out for each patch."""
    noisy, plain, keys = make(stochastic_positions=0.09), make(), torch.tensor([3, 4, 5])
    context, context_block, target_blocks = inputs
    noise = 0.3 * gaussian(keys, target_blocks, num_patches=24, width=WIDTH)
    positions, expected = plain.predictor_pos_embed[0], torch.empty(M, B, T, WIDTH)
    for m in range(M):
        for b in range(B):
            seen = plain.predictor_embed(context[b]) + positions[context_block[b]]
            masked = plain.mask_token[0] + positions[target_blocks[m, b]]
            masked = masked + noise[m, b] @ plain.predictor_embed.weight.T
            tokens = torch.cat([seen, masked])[None]
            for block in plain.predictor_blocks:
                tokens = block(tokens)
            expected[m, b] = plain.predictor_proj(plain.predictor_norm(tokens))[0, K:]
    assert torch.allclose(noisy(*inputs, keys), expected.flatten(0, 1), atol=1e-4)


def test_noise_needs_keys(inputs):
    with pytest.raises(ValueError, match="keys"):
        make(stochastic_positions=0.1)(*inputs)
