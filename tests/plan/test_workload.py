"""Parameters, operations and tokens of a configuration are those of the networks and masks that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planning import make_plan, write_tiny
from torch.utils.flop_counter import FlopCounterMode

from ijepa_ds.build import build_ijepa, build_sampler, build_target
from ijepa_ds.config import Config, load_config
from ijepa_ds.method.encoder import set_attention
from ijepa_ds.plan.predict import numbers

OTHER = ("ijepa.model.predictor_depth=3", "ijepa.model.mlp_ratio=2.5", "ijepa.masks.num_targets=2")
BATCH = 2


def counted_flops(config: Config, target_tokens: int) -> float:
    """Operations of an image in a step, by torch's counter."""
    sampler, model, target = build_sampler(config), build_ijepa(config), build_target(config).to_empty(device="cpu")
    for part in (model, target):
        set_attention(part, fused=False)
    patches = config.grid[0] * config.grid[1]
    images = torch.randn(BATCH, 3, *config.ijepa.data.image_size)
    context = torch.rand(BATCH, patches).argsort(1)[:, : sampler.context_tokens]
    blocks = torch.rand(sampler.num_targets, BATCH, patches).argsort(2)[..., :target_tokens]
    counter = FlopCounterMode(display=False)
    with counter:
        with torch.no_grad():
            targets = target.features_at(images, blocks)
        model(images, context, blocks, targets).backward()
    return counter.get_total_flops() / BATCH


@pytest.mark.parametrize("overrides", [(), OTHER])
def test_the_operations_are_those_that_torch_counts_over_the_masks_of_the_run(tmp_path: Path, overrides) -> None:
    path = write_tiny(tmp_path)
    plan = make_plan(path, *overrides, images=640)
    config = load_config(path, list(overrides))
    sampler = build_sampler(config)
    tokens = [sampler.block_sizes(step).target_tokens for step in range(plan.num_steps)]
    assert len(tokens) == 20 and len(set(tokens)) > 1
    by_count = {count: counted_flops(config, count) for count in set(tokens)}
    mean = sum(by_count[count] for count in tokens) / len(tokens)
    told = numbers(plan)
    assert told["gflop_per_image"] == pytest.approx(mean / 1e9, rel=1e-12)
    assert sum(told["gflop_of"].values()) == pytest.approx(told["gflop_per_image"])
    assert told["tokens"]["target_mean"] == pytest.approx(sum(tokens) / len(tokens))


@pytest.mark.parametrize("overrides", [(), OTHER])
def test_the_parameters_are_the_models(tmp_path: Path, overrides) -> None:
    path = write_tiny(tmp_path)
    model = build_ijepa(load_config(path, list(overrides)))
    trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in model.named_children()}
    told = numbers(make_plan(path, *overrides))
    for name, parameters in trained.items():
        assert told["parameters_of"][name] == sum(map(torch.numel, parameters))
    assert told["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_memory_is_counted_at_the_largest_target_blocks(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    sampler = build_sampler(load_config(path))
    tokens = make_plan(path).work.tokens
    assert tokens.most_target == sampler.max_target_tokens() > tokens.mean_target


def test_the_released_codes_masks_have_contexts_of_many_lengths(tmp_path: Path) -> None:
    overrides = ('ijepa.masks.sampler="reference"', "ijepa.masks.truncation_group=4", "ijepa.masks.min_keep=4")
    tokens = make_plan(write_tiny(tmp_path), *overrides, images=6400).work.tokens
    assert 4 < tokens.context < tokens.most_context < 8 * 12
