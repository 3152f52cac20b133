"""Shards: which elements of which parameter a rank holds, and that the slices of all make the whole."""

from __future__ import annotations

import pytest
import torch
from distributed_runs import averages_of, build_parts, masters_of, once, run_ranks, tiny_config, train_steps

from ijepa_ds.engine.shards import Placement, Shard, fill


def shard_of(first: int, length: int) -> Shard:
    """A slice of a flat group of 20 elements: "a" [2, 3] at 0, two elements of alignment, "b" [7] at 8."""
    placements = (Placement("a", 0, torch.Size([2, 3])), Placement("b", 8, torch.Size([7])))
    return Shard("group", placements, first, length, None)


@pytest.mark.parametrize(
    ("first", "length", "expected"),
    [
        (0, 20, [("a", 0, 6, 0), ("b", 0, 7, 8)]),
        (0, 10, [("a", 0, 6, 0), ("b", 0, 2, 8)]),
        (10, 10, [("b", 2, 7, 0)]),
        (4, 4, [("a", 4, 6, 0)]),
        (6, 2, []),
        (15, 5, []),
        (9, 3, [("b", 1, 4, 0)]),
    ],
)
def test_pieces_of_a_slice(first: int, length: int, expected: list[tuple]) -> None:
    pieces = [(piece.name, piece.start, piece.stop, piece.offset) for piece in shard_of(first, length).pieces()]
    assert pieces == expected


@pytest.mark.parametrize("length", [1, 3, 5, 7, 20])
def test_slices_of_any_length_make_the_whole(length: int) -> None:
    parameters = {"a": torch.arange(6.0).view(2, 3) + 1, "b": torch.arange(7.0) + 100}
    whole = {name: torch.zeros(values.numel()) for name, values in parameters.items()}
    for first in range(0, 20, length):
        shard, values = shard_of(first, length), torch.zeros(length)
        fill([(shard, values)], parameters)
        for piece in shard.pieces():
            whole[piece.name][piece.start : piece.stop] += piece.of(values)
    assert all(torch.equal(whole[name], parameters[name].view(-1)) for name in parameters)


def put_together() -> dict:
    """In a rank: the masters by our slices and as DeepSpeed gives them; then other masters, published."""
    from deepspeed.utils import safe_get_full_fp32_param

    results = {}
    for stage, accumulation in ((2, "fp32"), (1, "fp32"), (1, "bf16")):
        changes = {"zero_optimization__stage": stage, "data_types": {"grad_accum_dtype": accumulation}}
        changes["bf16"] = {"enabled": True}  # weights that are not the masters
        parts = build_parts(tiny_config(**changes))
        train_steps(parts, range(2))
        parameters = {n: p for n, p in parts.trainable.module.named_parameters() if p.requires_grad}
        masters, averages = masters_of(parts), averages_of(parts)
        theirs = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
        draw = torch.Generator().manual_seed(5)
        new = {name: torch.randn(parameter.shape, generator=draw) for name, parameter in parameters.items()}
        fill(parts.trainable.state().slices["master"], new)
        parts.trainable.publish()
        shards = parts.trainable.shards
        results[stage, accumulation] = {
            "same_as_deepspeed": masters.keys() == theirs.keys()
            and all(torch.equal(masters[name], theirs[name].float()) for name in theirs),
            "masters_are_the_new": all(torch.equal(values, new[name]) for name, values in masters_of(parts).items()),
            "weights_are_the_new": all(torch.equal(p, new[name].bfloat16()) for name, p in parameters.items()),
            "average_untouched": all(torch.equal(values, averages[n]) for n, values in averages_of(parts).items()),
            "held": {piece.name: piece.stop - piece.start for shard in shards for piece in shard.pieces()},
            "sizes": {name: parameter.numel() for name, parameter in parameters.items()},
        }
    return results


@once
def together(world_size: int) -> list[dict]:
    return run_ranks(put_together, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_slices_are_deepspeeds_masters(world_size: int) -> None:
    for rank in together(world_size):
        for result in rank.values():
            assert result["same_as_deepspeed"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_published_masters_are_every_ranks_weights(world_size: int) -> None:
    for rank in together(world_size):
        for result in rank.values():
            assert result["masters_are_the_new"] and result["weights_are_the_new"] and result["average_untouched"]


def test_a_parameter_may_lie_on_two_ranks() -> None:
    first, second = together(2)
    for key, result in first.items():
        others = second[key]["held"]
        split = [name for name, count in result["held"].items() if 0 < count < result["sizes"][name]]
        assert split, "a weak test: no parameter is split"
        for name, size in result["sizes"].items():
            assert result["held"].get(name, 0) + others.get(name, 0) == size
