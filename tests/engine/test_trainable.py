"""Every trainable: plain torch and each ZeRO stage and precision train alike, and as written out here by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed_runs import (
    averages_of,
    build_parts,
    made_up_batch,
    masters_of,
    once,
    run_ranks,
    tiny_config,
    train_steps,
)

from ijepa_ds.errors import UserError

PRECISIONS = {
    "bf16": {"bf16": {"enabled": True}},
    "bf16, bf16 sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "fp32": {"bf16": {}},
    "autocast": {"bf16": {}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
FP32 = PRECISIONS["fp32"]
PLAIN = -1  # in place of a ZeRO stage: without DeepSpeed
MATRIX = [(PLAIN, "fp32"), *((stage, precision) for stage in (0, 1, 2) for precision in PRECISIONS)]
TWO_RANKS = [(1, "bf16"), (1, "bf16, bf16 sums"), (2, "bf16"), (2, "fp32"), (2, "autocast"), (0, "fp32"), (0, "bf16")]
LR = 1e-3


def config_of(stage: int, precision: str, **changes: Any) -> dict:
    return tiny_config(zero_optimization={"stage": max(stage, 0)}, **PRECISIONS[precision], **changes)


# ---------------------------------------------------------------------------------------- every stage and precision


def train_with(stage: int, precision: str) -> dict | str:
    """In a rank: three steps, a step with a NaN gradient, one more step."""
    try:
        parts = build_parts(config_of(stage, precision), plain=stage == PLAIN)
    except UserError as error:
        return str(error)
    trainable = parts.trainable
    named = dict(trainable.module.named_parameters())
    result: dict[str, Any] = {
        "exact": all(torch.equal(values, parts.exact[name]) for name, values in masters_of(parts).items()),
        "trained": {n for n, p in named.items() if p.requires_grad} == set(masters_of(parts)),
        "adam_before": parts.adam_steps(),
    }
    start = averages_of(parts)
    result["losses"] = [train_steps(parts, range(1))[0] for _ in range(3)]  # thrice the same batch
    result["moved"] = max(float((values - start[name]).abs().max()) for name, values in averages_of(parts).items())
    result["adam_after"] = parts.adam_steps()
    result["decays"] = {
        placement.name: group["weight_decay"]
        for group in trainable.adam.param_groups
        for shard in trainable.shards
        for placement in shard.placements
        if shard.group == group["name"]
    }
    result["dimensions"] = {name: parameter.ndim for name, parameter in named.items()}

    masters, averages = masters_of(parts), averages_of(parts)
    poisoned = named["predictor.predictor_proj.bias"]
    if parts.process.rank == parts.process.world_size - 1:
        handle = poisoned.register_hook(lambda gradient: gradient * math.nan)
    train_steps(parts, range(5, 6))
    result["skipped"] = not bool(parts.outcome.applied)
    result["unchanged"] = all(torch.equal(masters[n], v) for n, v in masters_of(parts).items() if not v.isnan().any())
    result["finite"] = all(shard.master.isfinite().all() for shard in trainable.shards)
    result["target_kept"] = all(torch.equal(averages[name], values) for name, values in averages_of(parts).items())
    if parts.process.rank == parts.process.world_size - 1:
        handle.remove()
    result["loss_after"] = train_steps(parts, range(6, 7))[0]
    result["applied_after"] = bool(parts.outcome.applied)
    return result


def train_all(combinations: list[tuple[int, str]]) -> dict:
    return {combination: train_with(*combination) for combination in combinations}


@once
def trained(world_size: int) -> list[dict]:
    return run_ranks(train_all, world_size, MATRIX if world_size == 1 else TWO_RANKS)


CASES = [(1, *case) for case in MATRIX] + [(2, *case) for case in TWO_RANKS]
every_case = pytest.mark.parametrize(("world_size", "stage", "precision"), CASES)


def results_of(world_size: int, stage: int, precision: str) -> list[dict]:
    found = [rank[stage, precision] for rank in trained(world_size)]
    assert not any(isinstance(result, str) for result in found), found
    return found


@every_case
def test_trains(world_size: int, stage: int, precision: str) -> None:
    for result in results_of(world_size, stage, precision):
        assert result["trained"]
        first, *_, last = result["losses"]
        assert math.isfinite(last) and last < first
        assert result["moved"] > 1e-5
        assert result["losses"] == results_of(world_size, stage, precision)[0]["losses"]


@every_case
def test_masters_start_exact_and_adam_counts_from_one(world_size: int, stage: int, precision: str) -> None:
    for result in results_of(world_size, stage, precision):
        assert result["exact"]
        assert result["adam_before"] == {0.0} and result["adam_after"] == {3.0}


@every_case
def test_one_dimensional_tensors_do_not_decay(world_size: int, stage: int, precision: str) -> None:
    for result in results_of(world_size, stage, precision):
        assert result["decays"].keys() == {n for n in result["dimensions"] if "pos_embed" not in n}
        for name, decay in result["decays"].items():
            assert decay == (0.05 if result["dimensions"][name] > 1 else 0.0), name


@pytest.mark.parametrize(("world_size", "stage", "precision"), CASES)
def test_a_step_with_a_nan_gradient_is_skipped(world_size: int, stage: int, precision: str) -> None:
    for result in results_of(world_size, stage, precision):
        assert result["skipped"] and result["finite"] and result["unchanged"] and result["target_kept"]
        assert result["applied_after"] and math.isfinite(result["loss_after"])


# ------------------------------------------------------------------------------------------------- against plain torch


def losses_of(micro_batch: int, checkpointing: bool = False, stage: int = 2) -> dict:
    """In a rank: six fp32 steps."""
    changes = {"train_micro_batch_size_per_gpu": micro_batch, "ijepa__model__activation_checkpointing": checkpointing}
    parts = build_parts(config_of(stage, "fp32", **changes), plain=stage == PLAIN)
    losses = train_steps(parts, range(6), lr=LR)
    return {"losses": losses, "masters": masters_of(parts), "averages": averages_of(parts)}


def losses_of_all() -> dict:
    import torch.distributed as dist

    from ijepa_ds.engine.zero import init_distributed

    init_distributed()
    share = 16 // dist.get_world_size()
    cases = {
        "whole": losses_of(share),
        "accumulated": losses_of(share // 4),
        "checkpointing": losses_of(share, True),
        "not sharded": losses_of(share, stage=0),
    }
    if dist.get_world_size() == 1:
        cases |= {"without DeepSpeed": losses_of(4, stage=PLAIN)}
    return cases


def plain_torch() -> dict:
    """In one process: the same six steps without DeepSpeed, shards or our target encoder."""
    import torch.nn.functional as F

    from ijepa_ds.build import build_encoder, build_ijepa
    from ijepa_ds.config import parse_config

    config = parse_config(config_of(2, "fp32"))
    model, target = build_ijepa(config), build_encoder(config)
    target.load_state_dict(model.context_encoder.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(6):
        images, context_block, target_blocks = made_up_batch(config, step)
        with torch.no_grad():
            features = F.layer_norm(target(images), (32,))
        loss = torch.zeros(())
        predicted = model.predict(images, context_block, target_blocks).view(4, 16, 9, 32)
        for m in range(4):
            wanted = torch.stack([features[b, target_blocks[m, b]] for b in range(16)])
            loss = loss + F.smooth_l1_loss(predicted[m], wanted) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(target.parameters(), model.context_encoder.parameters(), strict=True):
                average.mul_(0.9).add_(parameter, alpha=0.1)
        losses.append(float(loss))
    averages = {f"context_encoder.{n}": p.detach() for n, p in target.named_parameters() if n != "pos_embed"}
    return {"losses": losses, "averages": averages}


@once
def compared(world_size: int) -> dict:
    return run_ranks(losses_of_all, world_size)[0]


@once
def reference() -> dict:
    return run_ranks(plain_torch, 1)[0]


SHARED_CASES = [(case, n) for case in ("whole", "accumulated", "checkpointing", "not sharded") for n in (1, 2)]


@pytest.mark.parametrize(("case", "world_size"), [*SHARED_CASES, ("without DeepSpeed", 1)])
def test_the_losses_are_those_written_out_by_hand(case: str, world_size: int) -> None:
    result = compared(world_size)[case]
    assert result["losses"] == pytest.approx(reference()["losses"], rel=1e-5)
    for name, values in reference()["averages"].items():
        # Adam's first steps are +-lr whatever the gradient's size, so where it is nearly 0 rounding decides its sign.
        assert float((result["averages"][name] - values).abs().median()) <= 1e-6, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_activation_checkpointing_changes_nothing(world_size: int) -> None:
    results = compared(world_size)
    assert results["checkpointing"]["losses"] == results["whole"]["losses"]
    for name, values in results["whole"]["masters"].items():
        assert torch.equal(results["checkpointing"]["masters"][name], values)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "cure"),
    [
        (2, 16, "set train_micro_batch_size_per_gpu to 8"),
        (8, 4, "set train_micro_batch_size_per_gpu to 2"),
        (3, 16, "use a number of processes that divides train_batch_size"),
        (32, 1, "use a number of processes that divides train_batch_size"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused(world_size: int, micro_batch: int, cure: str) -> None:
    from ijepa_ds.build import check_batch
    from ijepa_ds.config import parse_config
    from ijepa_ds.distributed import Process

    config = parse_config(tiny_config(train_micro_batch_size_per_gpu=micro_batch))
    with pytest.raises(UserError, match=cure) as error:
        check_batch(config, Process(0, world_size, torch.device("cpu")))
    assert f"{world_size} processes" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 16), (1, 1), (2, 8), (4, 4), (16, 1)])
def test_a_batch_that_divides_is_accepted(world_size: int, micro_batch: int) -> None:
    from ijepa_ds.build import check_batch
    from ijepa_ds.config import parse_config
    from ijepa_ds.distributed import Process

    config = parse_config(tiny_config(train_micro_batch_size_per_gpu=micro_batch))
    check_batch(config, Process(0, world_size, torch.device("cpu")))


def refused_by_deepspeed() -> list[str]:
    """In a rank: what DeepSpeed itself refuses, though a configuration could not say it, arrives as one sentence."""
    from ijepa_ds.engine.zero_internals import initialize

    messages, config = [], build_parts(tiny_config()).config
    for changes in ({"zero_optimization": {"stage": 2, "no_such_key": 1}}, {"bf16": {"enabled": True, "wrong": 1}}):
        module = torch.nn.Linear(2, 2)
        with pytest.raises(UserError) as error:
            initialize(module, torch.optim.AdamW(module.parameters()), {**config.deepspeed, **changes})
        messages.append(str(error.value))
    return messages


def test_what_deepspeed_refuses_is_one_sentence() -> None:
    (messages,) = run_ranks(refused_by_deepspeed, 1)
    for message, key in zip(messages, ("no_such_key", "wrong"), strict=True):
        assert message.startswith("DeepSpeed refuses this configuration") and key in message and "\n" not in message
