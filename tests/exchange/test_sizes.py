"""Sizes read off tensors, and the grid read off positions."""

from __future__ import annotations

import pytest
import torch
from released_files import SMALL

from ijepa_ds.errors import UserError
from ijepa_ds.exchange.sizes import (
    TensorSizes,
    attention_heads,
    expected_shapes,
    grid_of_positions,
    name_of,
    shape_differences,
    shapes_of,
    tensor_sizes,
)
from ijepa_ds.method.encoder import NAMED_DIMENSIONS, Dimensions, VisionTransformer
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.method.predictor import Predictor


def encoder_weights() -> dict[str, torch.Tensor]:
    return VisionTransformer((32, 16), 4, SMALL).state_dict()


def encoder_differences(weights: dict[str, torch.Tensor]) -> list[str]:
    sizes = tensor_sizes(weights)
    assert sizes is not None
    return shape_differences(shapes_of(weights), expected_shapes(sizes))


@pytest.mark.parametrize("name", NAMED_DIMENSIONS)
def test_sizes_of_every_named_encoder(name) -> None:
    dimensions = NAMED_DIMENSIONS[name]
    with torch.device("meta"):
        weights = VisionTransformer((56, 28), 14, dimensions).state_dict()
    sizes = tensor_sizes(weights)
    assert sizes == TensorSizes(dimensions.width, dimensions.depth, dimensions.hidden, 14)
    assert shape_differences(shapes_of(weights), expected_shapes(sizes)) == []
    heads = attention_heads(sizes.width, None, "x")
    assert name_of(Dimensions(sizes.width, sizes.depth, heads, sizes.hidden)) == name
    assert name_of(Dimensions(sizes.width, sizes.depth, heads, sizes.hidden + 1)) is None


def test_sizes_of_a_predictor() -> None:
    weights = Predictor((8, 4), 32, width=16, depth=3, heads=2).state_dict()
    assert tensor_sizes(weights, predictor=True) == TensorSizes(16, 3, 64, 32)
    assert shape_differences(shapes_of(weights), expected_shapes(TensorSizes(16, 3, 64, 32), predictor=True)) == []
    assert tensor_sizes(encoder_weights(), predictor=True) is None and tensor_sizes(weights) is None


def test_every_missing_extra_and_misshapen_tensor_is_named() -> None:
    weights = encoder_weights()
    del weights["blocks.0.attn.proj.bias"], weights["norm.bias"]
    weights["cls_token"] = torch.zeros(1, 1, 32)
    weights["blocks.1.norm1.weight"] = torch.ones(28)
    weights["patch_embed.proj.weight"] = torch.ones(16, 3, 4, 4)
    weights["pos_embed"] = torch.zeros(32, 32)
    assert sorted(encoder_differences(weights)) == [
        "blocks.0.attn.proj.bias is missing",
        "blocks.1.norm1.weight is [28], not [32]",
        "cls_token is unknown",
        "norm.bias is missing",
        "patch_embed.proj.weight is [16, 3, 4, 4], not [32, 3, 4, 4]",
        "pos_embed is [32, 32], not [1, any, 32]",
    ]


def test_a_block_that_is_missing_whole_is_named() -> None:
    weights = {name: t for name, t in encoder_weights().items() if not name.startswith("blocks.0.")}
    problems = encoder_differences(weights)
    assert len(problems) == 12 and all(problem.startswith("blocks.0.") for problem in problems)


def test_what_several_blocks_have_alike_is_one_line() -> None:
    weights = {name: t for name, t in encoder_weights().items() if not name.endswith("attn.qkv.bias")}
    weights["blocks.0.norm2.weight"] = weights["blocks.1.norm2.weight"] = torch.ones(28)
    weights["blocks.1.ls1.gamma"] = torch.ones(32)
    assert encoder_differences(weights) == [
        "blocks.*.attn.qkv.bias is missing, in 2 blocks",
        "blocks.*.norm2.weight is [28], not [32], in 2 blocks",
        "blocks.1.ls1.gamma is unknown",
    ]


@pytest.mark.parametrize("grid", [(8, 8), (8, 4), (4, 8), (1, 7), (16, 16), (2, 18)])
def test_the_grid_is_read_off_the_positions(grid) -> None:
    table = sine_cosine_positions(32, grid)[None]
    assert grid_of_positions(table, "x") == grid
    assert grid_of_positions(table.bfloat16(), "x") == grid
    assert grid_of_positions(table + 9e-6, "x") == grid
    for other in (table + 3e-5, 0.02 * torch.randn(table.shape)):  # learned, for example
        with pytest.raises(
            UserError, match=f"x has other positions than .* on any grid of {grid[0] * grid[1]} patches"
        ):
            grid_of_positions(other, "x")


def test_heads() -> None:
    assert attention_heads(1280, None, "x") == 16 and attention_heads(32, 4, "x") == 4
    with pytest.raises(UserError, match="--heads or a configuration"):
        attention_heads(32, None, "x")
    for wrong in (0, 5, -1):
        with pytest.raises(UserError, match=f"--heads {wrong} does not divide the width of 32"):
            attention_heads(32, wrong, "x")
