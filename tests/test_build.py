"""What a configuration becomes."""

from __future__ import annotations

import pytest
import torch
from distributed_runs import tiny_config

from ijepa_ds.build import build_target
from ijepa_ds.config import parse_config


@pytest.mark.parametrize(
    "changes, fused",
    [
        ({}, True),
        ({"bf16__enabled": True}, False),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, False),
    ],
    ids=["fp32", "bf16", "autocast"],
)
def test_a_cpu_attends_in_explicit_products_where_they_are_in_bf16(monkeypatch, changes, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    encoder = build_target(parse_config(tiny_config(**changes)))
    assert {block.attn.fused_attn for block in encoder.blocks} == {fused}
