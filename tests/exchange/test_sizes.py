"""Sizes read off tensors, and the grid read off positions."""

from __future__ import annotations

import pytest
import torch
from released_files import SMALL

from ijepa_ds.errors import UserError
from ijepa_ds.exchange.sizes import (
    TensorSizes,
    encoder_problems,
    encoder_sizes,
    grid_of_positions,
    heads_of_width,
    mlp_ratio,
    name_of,
    predictor_problems,
    predictor_sizes,
)
from ijepa_ds.method.encoder import NAMED_DIMENSIONS, Dimensions, VisionTransformer
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.method.predictor import Predictor


def encoder_weights() -> dict[str, torch.Tensor]:
    return VisionTransformer((32, 16), 4, SMALL).state_dict()


@pytest.mark.parametrize("name", NAMED_DIMENSIONS)
def test_sizes_of_every_named_encoder(name) -> None:
    dimensions = NAMED_DIMENSIONS[name]
    with torch.device("meta"):
        weights = VisionTransformer((56, 28), 14, dimensions).state_dict()
    sizes = encoder_sizes(weights)
    assert sizes == TensorSizes(dimensions.width, dimensions.depth, int(dimensions.width * dimensions.mlp_ratio), 14)
    assert encoder_problems(weights, sizes) == []
    found = Dimensions(
        sizes.width, sizes.depth, heads_of_width(sizes.width, None, "x"), mlp_ratio(sizes.width, sizes.hidden)
    )
    assert name_of(found) == name


def test_sizes_of_a_predictor() -> None:
    weights = Predictor((8, 4), 32, width=16, depth=3, heads=2).state_dict()
    assert predictor_sizes(weights) == TensorSizes(16, 3, 64, 32)
    assert predictor_problems(weights, TensorSizes(16, 3, 64, 32)) == []
    assert predictor_sizes(encoder_weights()) is None and encoder_sizes(weights) is None


def test_every_missing_extra_and_misshapen_tensor_is_named() -> None:
    weights = encoder_weights()
    del weights["blocks.0.attn.proj.bias"], weights["norm.bias"]
    weights["cls_token"] = torch.zeros(1, 1, 32)
    weights["blocks.1.norm1.weight"] = torch.ones(28)
    weights["patch_embed.proj.weight"] = torch.ones(16, 3, 4, 4)
    weights["pos_embed"] = torch.zeros(32, 32)
    assert sorted(encoder_problems(weights, encoder_sizes(weights))) == [
        "blocks.0.attn.proj.bias is missing",
        "blocks.1.norm1.weight is [28], not [32]",
        "cls_token is none of I-JEPA's tensors",
        "norm.bias is missing",
        "patch_embed.proj.weight is [16, 3, 4, 4], not [32, 3, 4, 4]",
        "pos_embed is [32, 32], not [1, patches, 32]",
    ]


def test_a_block_that_is_missing_whole_is_named() -> None:
    weights = {name: t for name, t in encoder_weights().items() if not name.startswith("blocks.0.")}
    problems = encoder_problems(weights, encoder_sizes(weights))
    assert len(problems) == 12 and all(problem.startswith("blocks.0.") for problem in problems)


@pytest.mark.parametrize("grid", [(8, 8), (8, 4), (4, 8), (1, 7), (16, 16), (2, 18)])
def test_the_grid_is_read_off_the_positions(grid) -> None:
    table = sine_cosine_positions(32, grid)[None]
    assert grid_of_positions(table) == grid
    assert grid_of_positions(table.bfloat16()) == grid
    assert grid_of_positions(table + 9e-6) == grid
    assert grid_of_positions(table + 3e-5) is None


def test_learned_positions_are_of_no_grid() -> None:
    assert grid_of_positions(0.02 * torch.randn(1, 64, 32)) is None


def test_heads() -> None:
    assert heads_of_width(1280, None, "x") == 16 and heads_of_width(32, 4, "x") == 4
    with pytest.raises(UserError, match="--heads or a configuration"):
        heads_of_width(32, None, "x")
    for wrong in (0, 5, -1):
        with pytest.raises(UserError, match=f"--heads {wrong} does not divide the width of 32"):
            heads_of_width(32, wrong, "x")


def test_any_hidden_width_has_a_ratio() -> None:
    assert all(int(width * mlp_ratio(width, hidden)) == hidden for width in (12, 36, 1408) for hidden in range(1, 7000))
