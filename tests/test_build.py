"""What a configuration becomes."""

from __future__ import annotations

import pytest
import torch
from distributed_runs import tiny_config

from ijepa_ds.build import build_target, check_batch, check_stages, layer_costs
from ijepa_ds.config import Config, parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError


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


# ------------------------------------------------------------------------------------------------- pipeline stages


def in_stages(stages: int, **changes) -> Config:
    zero = {"stage": 1 if stages > 1 else 2}
    return parse_config(tiny_config(ijepa__pipeline={"stages": stages}, zero_optimization=zero, **changes))


def refusal(config: Config, processes: int) -> str:
    with pytest.raises(UserError) as refused:
        check_batch(config, Process(0, processes, torch.device("cpu")))
    return str(refused.value)


def test_stages_that_do_not_divide_the_processes_are_refused():
    assert "ijepa.pipeline.stages = 2 does not divide 3 processes" in refusal(in_stages(2), 3)


def test_more_stages_than_layers_are_refused():
    check_stages(in_stages(5, train_micro_batch_size_per_gpu=5, train_batch_size=15))
    with pytest.raises(UserError, match=r"ijepa.pipeline.stages = 6 is more than the model's 5 layers.*at most 5"):
        check_stages(in_stages(6, train_micro_batch_size_per_gpu=6, train_batch_size=12))


def test_a_pipeline_that_waits_too_long_is_refused_with_its_bubble():
    check_batch(in_stages(2), Process(0, 2, torch.device("cpu")))  # 4 micro-batches: a fifth
    told = refusal(in_stages(2, train_micro_batch_size_per_gpu=8), 2)
    assert "2 micro-batches a step keep 2 pipeline stages waiting for 33% of their time" in told
    assert "train_batch_size = 16 does not divide into 6 processes" in refusal(in_stages(2), 6)


def test_the_predictor_weighs_as_much_as_it_computes():
    config = parse_config(tiny_config(ijepa__model={"encoder": "huge", "patch_size": 14}, ijepa__data__image_size=224))
    embedding, *blocks, norm, predictor = layer_costs(config)
    assert len(blocks) == 32 and norm == 0 and embedding < blocks[0] / 10
    assert 6.5 < predictor / blocks[0] < 7.5  # by parameters 1.1
