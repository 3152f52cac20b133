"""Configurations for weights that come without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_runs import tiny_config
from released_files import SMALL

from ijepa_ds.build import encoder_dimensions
from ijepa_ds.config import load_config, parse_config
from ijepa_ds.exchange.inferred_config import infer_config, size_differences
from ijepa_ds.exchange.read import ForeignEncoder
from ijepa_ds.exchange.sizes import TensorSizes
from ijepa_ds.method.encoder import NAMED_DIMENSIONS, Dimensions


def test_the_named_sizes_take_the_recipe_of_their_file() -> None:
    def of(name: str, patch: int, side: int, depth: int) -> tuple[dict, str]:
        encoder = ForeignEncoder("x", "reference", "target", {}, NAMED_DIMENSIONS[name], patch, (side, side))
        return infer_config(encoder, TensorSizes(384, depth, 1536, NAMED_DIMENSIONS[name].width))

    for file, sizes in {"vith14": ("huge", 14, 16, 12), "vith16_448": ("huge", 16, 28, 12)}.items():
        raw, origin = of(*sizes)
        assert origin == f"the recipe is that of ds_configs/{file}.json"
        raw["ijepa"]["run"] = {"name": file}
        expected = load_config(Path(__file__).resolve().parents[2] / "ds_configs" / f"{file}.json")
        assert parse_config(raw).recipe() == expected.recipe()
        assert "$schema" not in raw
    assert "no file of ds_configs/" in of("huge", 14, 32, 12)[1]


def test_an_encoder_alone_is_enough() -> None:
    raw, _ = infer_config(ForeignEncoder("x", "timm", "unknown", {}, SMALL, 4, (8, 4)))
    raw["ijepa"]["run"] = {"name": "x"}
    config = parse_config(raw)
    assert config.ijepa.data.image_size == (32, 16) and config.grid == (8, 4)
    assert size_differences(config, ForeignEncoder("x", "timm", "unknown", {}, SMALL, 4, (12, 12))) == []


@pytest.mark.parametrize("hidden", [*range(1, 40), 575, 577, 6143])
def test_any_hidden_width_survives_the_configuration(hidden) -> None:
    for width in (12, 36, 1408):
        encoder = ForeignEncoder("x", "timm", "unknown", {}, Dimensions(width, 1, 1, hidden), 4, (8, 8))
        raw, _ = infer_config(encoder)
        raw["ijepa"]["run"] = {"name": "x"}
        if raw["ijepa"]["model"]["mlp_ratio"] >= 0.1:  # a configuration has no narrower ones
            assert encoder_dimensions(parse_config(raw)).hidden == hidden


def test_heads_are_compared_where_a_file_tells_them() -> None:
    config = parse_config(tiny_config(ijepa__model__heads=4))
    for file_format, expected in {
        "transformers": ["heads: 2 in the file, 4 in the configuration"],
        "timm": [],
    }.items():
        assert size_differences(config, ForeignEncoder("x", file_format, "unknown", {}, SMALL, 4, (8, 8))) == expected
