"""The plain baseline computes what the product computes, and the benchmark of a step compares the two."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from ijepa_ds.engine.plain import Plain
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.method.schedules import Hyperparameters

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plain_ijepa
import step as step_benchmark
from distributed_runs import run_ranks

IMAGE_SIZE, PATCH, GRID = (16, 24), 4, (4, 6)
# A large eps: the bias of the keys has no gradient but rounding, which AdamW would make steps of.
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-4}
NOW = Hyperparameters(lr=1e-3, weight_decay=0.05, momentum=0.9)


class Batch:
    """Three images, whose context blocks are cut to five patches."""

    keys = None

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(3, 3, *IMAGE_SIZE, generator=draw)
        orders = torch.rand(3, 24, generator=draw).argsort(1)
        self.context_block = plain_ijepa.cut_to_shortest([order[: 5 + n] for n, order in enumerate(orders)])
        self.target_blocks = torch.rand(4, 3, 24, generator=draw).argsort(2)[..., :6].contiguous()


def ours() -> Plain:
    def encoder() -> VisionTransformer:
        return VisionTransformer(IMAGE_SIZE, PATCH, Dimensions(16, 3, 2), generator=torch.Generator().manual_seed(1))

    model = IJEPA(encoder(), Predictor(GRID, 16, width=8, depth=2, heads=2))
    for weight in model.parameters():
        if weight.requires_grad and weight.ndim > 1:
            weight.data *= 20  # initial weights are so small that the blocks hardly matter
    with torch.device("meta"):
        target = encoder()
    return Plain(model, target, to_input=lambda images: images, **SETTINGS)


def plainly(model: IJEPA, trainer: type = plain_ijepa.PlainTrainer, **more: object) -> plain_ijepa.PlainTrainer:
    """The baseline with the weights of ``model``: every name and shape fits."""
    encoder = plain_ijepa.Encoder(GRID, PATCH, width=16, depth=3, heads=2, hidden=64)
    predictor = plain_ijepa.Predictor(GRID, 16, width=8, depth=2, heads=2)
    encoder.load_state_dict(model.context_encoder.state_dict())
    predictor.load_state_dict(model.predictor.state_dict())
    now = {"lr": NOW.lr, "weight_decay": NOW.weight_decay, "momentum": NOW.momentum}
    return trainer(encoder, predictor, **now, **SETTINGS, **more)


def test_losses_weights_and_average_of_the_plain_method_are_ours():
    trainable, batch = ours(), Batch()
    plain = plainly(trainable.module)
    assert batch.context_block.shape == (3, 5)
    for _ in range(3):
        loss = plain.step(batch.images, batch.context_block, batch.target_blocks)
        expected = trainable.step(iter([batch]), NOW).losses
        torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    for name, part in trainable.module.named_children():
        weights = {"context_encoder": plain.encoder, "predictor": plain.predictor}[name].state_dict()
        for parameter, values in part.state_dict().items():
            torch.testing.assert_close(weights[parameter], values, rtol=1e-4, atol=1e-6)
    averages = plain.target_encoder.state_dict()
    for parameter, values in trainable.target_encoder.encoder.state_dict().items():
        torch.testing.assert_close(averages[parameter], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainer", ["autocast", "masters"])
def test_the_plain_method_in_bf16_is_near_that_in_fp32(trainer):
    batch, model = Batch(), ours().module
    exact = plainly(model)
    more = {"autocast": torch.bfloat16} if trainer == "autocast" else {}
    half = plainly(model, plain_ijepa.HalfPrecisionTrainer if trainer == "masters" else type(exact), **more)
    losses = []
    for _ in range(3):
        images = batch.images if trainer == "autocast" else batch.images.bfloat16()
        loss = half.step(images, batch.context_block, batch.target_blocks)
        expected = exact.step(batch.images, batch.context_block, batch.target_blocks)
        assert loss.dtype == torch.float32 and loss != expected
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
        losses.append(loss)
    assert losses[2] < losses[0]


def compared() -> list[dict]:
    step_benchmark.MODELS["tiny32"] = ("cifar10_tiny.json", 4, ["ijepa.model.depth=2", "ijepa.model.predictor_depth=2"])
    return [step_benchmark.compare("tiny32", precision, 1, rounds=2, memory=False) for precision in ("fp32", "bf16")]


@pytest.mark.long
def test_the_benchmark_compares_a_step_of_ours_with_a_plain_one(tmp_path):
    """Both take the same step: ``compare`` refuses sides whose losses differ."""
    (results,) = run_ranks(compared, 1)
    for result in results:
        assert result["compared_with"] in ("plain", "plain, autocast")
        assert (result["context_tokens"], result["images"], result["threads"]) == (18, 4, 1)
        for side in result["sides"].values():
            assert min(side["parts_ms"].values()) > 0
            assert side["operations_ms"]["products"] > 0 and side["operations_ms"]["GELU"] > 0
            assert side["loss"] == pytest.approx(result["sides"]["ours"]["loss"], rel=2e-2)
        assert "as fast as" in step_benchmark.show(result)
    assert "ours without DeepSpeed" in results[0]["sides"] and "plain, autocast" in results[1]["sides"]
    step_benchmark.draw(results, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_clocks_leave_what_they_timed_as_it_was():
    class Owner:
        def work(self) -> str:
            return "done"

    owner, spent = Owner(), {"part": 0.0}
    backward = torch.Tensor.backward
    calls = {"part": [(owner, "work"), (owner, "absent"), (torch.Tensor, "backward")]}
    with step_benchmark.clocks(calls, spent, time.perf_counter):
        assert owner.work() == "done"
        assert torch.Tensor.backward is not backward
    assert spent["part"] > 0
    assert "work" not in vars(owner) and torch.Tensor.backward is backward
