"""The target encoder against a single-process fp32 average of the same master weights, at 1 and 2 ranks."""

from __future__ import annotations

import pytest
import torch
from distributed_runs import averages_of, build_parts, masters_of, once, run_ranks, tiny_config, train_steps

MOMENTA = (0.9, 0.99, 0.996, 0.9, 0.999, 0.5)


def watch_the_average() -> dict:
    """In a rank: train, and average the whole masters beside the target encoder."""
    from deepspeed.utils import safe_get_full_fp32_param

    parts = build_parts(tiny_config(bf16={"enabled": True}))  # in which an average would hardly move
    trainable = parts.trainable
    encoder = trainable.module.context_encoder
    trained = {f"context_encoder.{n}": p for n, p in encoder.named_parameters() if p.requires_grad}
    start, expected = averages_of(parts), {name: parts.exact[name].clone() for name in trained}
    worst, working_is_cast = 0.0, True
    for step, momentum in enumerate(MOMENTA):
        train_steps(parts, range(step, step + 1), momentum=momentum)
        for name, parameter in trained.items():  # DeepSpeed's own way to the masters, not ours
            expected[name] = torch.lerp(expected[name], safe_get_full_fp32_param(parameter).float(), 1 - momentum)
        averages = averages_of(parts)
        worst = max(worst, max(float((averages[name] - expected[name]).abs().max()) for name in trained))
        trainable.features(torch.zeros(1, 3, 32, 32))  # waits for what is on its way
        weights = dict(trainable.target_encoder.encoder.named_parameters())
        working_is_cast &= all(
            torch.equal(weights[name.removeprefix("context_encoder.")], average.to(torch.bfloat16))
            for name, average in averages.items()
        )
    optimizer = trainable.engine.optimizer
    optimized = [p for group in optimizer.optimizer.param_groups for p in group["params"]] + [
        p for group in optimizer.bit16_groups for p in group
    ]
    storages = {p.untyped_storage().data_ptr() for p in optimized}
    return {
        "names": (set(trained), set(averages)),
        "start_is_exact": all(torch.equal(start[name], parts.exact[name]) for name in trained),
        "worst": worst,
        "moved": max(float((averages[name] - start[name]).abs().max()) for name in trained),
        "averages": averages,
        "working_is_cast": working_is_cast,
        "dtypes": {p.dtype for p in weights.values()},
        "requires_grad": any(p.requires_grad or p.grad is not None for p in weights.values()),
        "training_mode": trainable.target_encoder.encoder.training,
        "is_optimized": any(p.untyped_storage().data_ptr() in storages for p in weights.values()),
        "context_weights": {n: p.detach().clone() for n, p in trained.items()},
        "masters": masters_of(parts),
    }


@once
def watched(world_size: int) -> list[dict]:
    return run_ranks(watch_the_average, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_a_single_process_average_of_the_masters(world_size: int) -> None:
    for rank in watched(world_size):
        assert rank["names"][0] == rank["names"][1]  # the trained parameters of the encoder, all and nothing else
        assert rank["start_is_exact"]  # of the fp32 weights, not of their bf16 roundings
        assert rank["worst"] <= 1e-7
        assert rank["moved"] > 1e-4


@pytest.mark.parametrize("world_size", [1, 2])
def test_working_weights_are_the_average_cast(world_size: int) -> None:
    for rank in watched(world_size):
        assert rank["working_is_cast"]
        assert rank["dtypes"] == {torch.bfloat16}


@pytest.mark.parametrize("world_size", [1, 2])
def test_is_never_trained(world_size: int) -> None:
    for rank in watched(world_size):
        assert not rank["requires_grad"] and not rank["is_optimized"] and not rank["training_mode"]


def test_both_ranks_hold_the_same_whole() -> None:
    first, second = watched(2)
    for name in first["averages"]:
        assert torch.equal(first["averages"][name], second["averages"][name])
        assert torch.equal(first["context_weights"][name], second["context_weights"][name])
        assert torch.equal(first["context_weights"][name], first["masters"][name].bfloat16())


def read_the_targets() -> dict:
    """In a rank: targets of the engine's target encoder and of one made by hand from its average, all in fp32."""
    import torch.nn.functional as F

    from ijepa_ds.build import build_encoder

    parts = build_parts(tiny_config())
    train_steps(parts, range(2))
    encoder = build_encoder(parts.config)
    names = {f"context_encoder.{name}": p for name, p in encoder.named_parameters() if p.requires_grad}
    for name, average in averages_of(parts).items():
        names[name].data.copy_(average)
    images, blocks = torch.randn(3, 3, 32, 32), torch.randint(0, 64, (4, 3, 5))
    with torch.no_grad():
        features = F.layer_norm(encoder(images), (32,))
        by_hand = torch.stack([features[b, blocks[m, b]] for m in range(4) for b in range(3)])
    target_encoder, average = parts.trainable.target_encoder, parts.trainable.average
    ours, averages = target_encoder(images, blocks), [values.clone() for _, values in average.slices]
    average.update(1.0, torch.tensor(True))
    unmoved = all(torch.equal(values, before) for (_, values), before in zip(average.slices, averages, strict=True))
    average.update(0.0, torch.tensor(True))
    copied = all(torch.equal(values, shard.master) for shard, values in average.slices)
    after = target_encoder(images, blocks)
    return {"ours": ours, "by_hand": by_hand, "unmoved": unmoved, "copied": copied, "after": after}


def test_targets_are_the_averages_normalised_features_at_the_blocks() -> None:
    (rank,) = run_ranks(read_the_targets, 1)
    assert rank["ours"].dtype == torch.float32 and not rank["ours"].requires_grad
    torch.testing.assert_close(rank["ours"], rank["by_hand"], rtol=0, atol=2e-5)
    assert rank["unmoved"] and rank["copied"]  # momentum 1 keeps it, momentum 0 copies the context encoder
    assert (rank["after"] - rank["ours"]).abs().max() > 1e-4
