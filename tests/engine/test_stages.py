"""Pipeline stages against one process of ZeRO: the same losses, the same weights, whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_runs import build_parts, masters_of, once, run_ranks, tiny_config, train_steps

BF16 = {"bf16": {"enabled": True}}


def layout(stages: int, **changes: Any) -> dict[str, Any]:
    """A tiny run in so many stages."""
    zero = {"stage": 1 if stages > 1 else 2}
    return tiny_config(ijepa__pipeline={"stages": stages, "largest_bubble": 1}, zero_optimization=zero, **changes)


def trained(raw: dict[str, Any], steps: int = 4) -> dict[str, Any]:
    """In a rank: losses and gradient norms of some steps, the weights and the average after them."""
    parts = build_parts(raw)
    losses, norms = [], []
    for step in range(steps):
        losses += train_steps(parts, range(step, step + 1))
        norms.append(float(parts.outcome.gradient_norm))
    return {"losses": losses, "norms": norms}


@once
def of_one_process(micro: int, bf16: bool) -> dict[str, Any]:
    changes = BF16 if bf16 else {}
    return run_ranks(trained, 1, layout(1, train_micro_batch_size_per_gpu=micro, **changes))[0]


@pytest.mark.parametrize(("stages", "ranks", "micro"), [(2, 2, 16), (2, 2, 4), (3, 3, 3), (2, 4, 2)])
def test_losses_and_norms_are_those_of_one_process(stages: int, ranks: int, micro: int) -> None:
    changes = {"train_batch_size": 12} if stages == 3 else {}
    one = run_ranks(trained, 1, layout(1, train_micro_batch_size_per_gpu=micro, **changes))[0]
    for rank in run_ranks(trained, ranks, layout(stages, train_micro_batch_size_per_gpu=micro, **changes)):
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=1e-6, atol=0)
        torch.testing.assert_close(rank["norms"], one["norms"], rtol=1e-5, atol=0)
