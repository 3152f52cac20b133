"""Sixteen processes, as ZeRO 2 and as 4 stages x 4: who holds what, who reads what, and the losses of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from distributed_runs import build_parts, once, run_ranks, tiny_config, train_beton, train_steps

RANKS, STEPS = 16, 3
KINDS = ("master", "exp_avg", "exp_avg_sq", "target")


def layout(stages: int) -> dict[str, Any]:
    return tiny_config(
        train_micro_batch_size_per_gpu=stages,  # an image a process
        ijepa__pipeline={"stages": stages, "largest_bubble": 1},
        zero_optimization={"stage": 1 if stages > 1 else 2, "reduce_bucket_size": 10**6},
    )


def what_a_rank_has(raw: dict[str, Any]) -> dict[str, Any]:
    """In a rank: losses, the samples that it reads of two steps, its pieces of the state."""
    from ijepa_ds.build import build_loader, build_sampler
    from ijepa_ds.data.beton import inspect_dataset

    parts = build_parts(raw)
    config = parts.config
    losses = train_steps(parts, range(STEPS))
    loader = build_loader(config, inspect_dataset(config.ijepa.data.train), build_sampler(config), parts.trainable)
    samples = [np.concatenate([r.samples for r in loader._requests(step, step + 1)]) for step in range(2)]
    pieces = {
        kind: [
            (piece.name, piece.start, piece.of(values.view(-1)).clone())
            for shard, values in slices
            for piece in shard.pieces()
        ]
        for kind, slices in parts.trainable.state().slices.items()
    }
    whole = [loader.step_samples(step) for step in range(2)]
    return {"losses": losses, "samples": samples, "whole": whole, "pieces": pieces, "shapes": parts.exact}


@once
def of_ranks(stages: int, ranks: int) -> list[dict[str, Any]]:
    train_beton()
    return run_ranks(what_a_rank_has, ranks, layout(stages))


def assemble(ranks: list[dict[str, Any]], kind: str) -> dict[str, torch.Tensor]:
    """Whole tensors; every element must be held by one rank."""
    whole: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, start, values in rank["pieces"][kind]:
            shape = rank["shapes"][name].shape
            whole.setdefault(name, torch.zeros(shape)).view(-1)[start : start + len(values)] = values
            held.setdefault(name, torch.zeros(shape)).view(-1)[start : start + len(values)] += 1
    assert all((counts == 1).all() for counts in held.values()), f"{kind}: an element is held by nobody, or twice"
    return whole


@pytest.mark.long
@pytest.mark.parametrize("stages", [1, 4])
def test_the_losses_are_those_of_one_process(stages: int) -> None:
    alone = of_ranks(1, 1)[0]["losses"]
    for rank in of_ranks(stages, RANKS):
        torch.testing.assert_close(rank["losses"], alone, rtol=1e-6, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("stages", [1, 4])
def test_every_image_of_a_step_is_read_by_one_rank(stages: int) -> None:
    ranks = of_ranks(stages, RANKS)
    for step in range(2):
        read = np.concatenate([rank["samples"][step] for rank in ranks])
        assert len(read) == len(set(read)) == 16
        assert set(read) == set(ranks[0]["whole"][step])


@pytest.mark.long
@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_together_hold_the_whole_once(stages: int, kind: str) -> None:
    ranks, alone = of_ranks(stages, RANKS), of_ranks(1, 1)
    whole, expected = assemble(ranks, kind), assemble(alone, kind)
    assert whole.keys() == expected.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-4, atol=1e-5)
    elements = sum(values.numel() for values in whole.values())
    share = [sum(len(values) for _, _, values in rank["pieces"][kind]) / elements for rank in ranks]
    if stages == 1:  # of stages, which weigh by arithmetic and not by weights, each has a share of its own
        assert max(share) < 1.1 / RANKS
    assert sum(share) == pytest.approx(1)
