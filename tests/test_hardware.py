"""What this machine computes fast: the timing behind it, and the sentence where bf16 is emulated."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import TrainingRun, once, run_ranks, run_training, tiny_config, train_beton

from ijepa_ds import hardware

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SAID = "bf16 is not faster than fp32 here"


def timed(monkeypatch: pytest.MonkeyPatch, *, bf16: float, fp32: float) -> None:
    monkeypatch.setattr(hardware, "product_seconds", lambda: {torch.bfloat16: bf16, torch.float32: fp32})


def test_the_products_are_timed_once_and_leave_the_threads_as_they_were():
    threads = torch.get_num_threads()
    first = hardware.product_seconds()
    assert first.keys() == {torch.bfloat16, torch.float32} and all(seconds > 0 for seconds in first.values())
    assert hardware.product_seconds() is first and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("rates", "sizes", "peak"),
    [
        ({256: 1e11, 512: 3e11, 1024: 2e11}, [256, 512, 1024], 3e11),  # the last takes 11 ms: long enough
        ({256: 1e9}, [256], 1e9),  # a processor that emulates bf16
        ({256 << n: 1e15 * (n + 1) for n in range(6)}, [256, 512, 1024, 2048, 4096, 8192], 6e15),
    ],
)
def test_the_peak_is_that_of_the_fastest_product_and_found_once(monkeypatch, rates, sizes, peak):
    tried: list[int] = []

    def rate(size: int, *_: object, seconds: float) -> float:
        tried.append(size)
        return rates[size]

    monkeypatch.setattr(hardware, "product_flops", rate)
    hardware.peak_flops.cache_clear()
    assert [hardware.peak_flops(CPU, torch.float32) for _ in range(2)] == [peak, peak] and tried == sizes
    hardware.peak_flops.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_has_a_rate_and_draws_nothing_that_a_run_would(dtype):
    state = torch.get_rng_state()
    assert 0 < hardware.product_flops(64, CPU, dtype, seconds=0.001) < 1e15
    assert torch.equal(torch.get_rng_state(), state), "initial weights must not depend on a measurement"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are of x86 processors")
def test_a_processor_without_bf16_arithmetic_is_known():
    """Most of it is taken away by the environment, so that the libraries emulate bf16 on every processor."""
    program = "import torch; from ijepa_ds.hardware import has_fast_bf16; print(has_fast_bf16(torch.device('cpu')))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


@pytest.mark.parametrize(("bf16", "fast"), [(0.1, True), (0.7, True), (0.95, False), (30.0, False)])
def test_bf16_is_fast_where_its_product_is_clearly_faster(monkeypatch, bf16, fast):
    timed(monkeypatch, bf16=bf16, fp32=1.0)
    assert hardware.has_fast_bf16(CPU) is fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_of_gpus_the_generation_tells(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu = torch.device("cuda", 0)
    assert hardware.has_fast_bf16(gpu) is fast
    assert hardware.why(gpu) == f"a GPU {'has' if fast else 'lacks'} arithmetic for bf16"


def test_emulated_bf16_is_one_sentence_with_the_cure(monkeypatch):
    timed(monkeypatch, bf16=0.01, fp32=0.0005)
    monkeypatch.setattr(hardware, "processor_name", lambda: "a laptop's")
    assert hardware.bf16_warning(True, CPU, cure="--set bf16.enabled=false") == (
        "bf16 is not faster than fp32 here: a product of 256 x 256 takes 10 ms in bf16 and 0.5 ms in fp32 on a "
        "laptop's; --set bf16.enabled=false computes in fp32"
    )
    assert hardware.bf16_warning(False, CPU, cure="") is None
    timed(monkeypatch, bf16=0.0002, fp32=0.0005)
    assert hardware.bf16_warning(True, CPU, cure="") is None


def test_the_processor_has_a_name():
    assert hardware.processor_name().strip()


def emulate_bf16() -> None:
    hardware.product_seconds = lambda: {torch.bfloat16: 0.01, torch.float32: 0.0005}


@once
def emulated_run() -> TrainingRun:
    config = tiny_config(ijepa__run__name="emulated", ijepa__run__stop_after_steps=1, bf16={"enabled": True})
    return run_training(config, 2, prepare=emulate_bf16)


def test_a_run_with_emulated_bf16_says_so_once_and_goes_on():
    run = emulated_run()
    assert run.exit_codes == [0, 0] and len(run.losses) == 1, run.output
    assert run.output.count(SAID) == 1 and "for a new run, --set bf16.enabled=false computes in fp32" in run.output


def test_autocast_has_a_cure_of_its_own_and_fp32_needs_none():
    one_step = {"ijepa__run__stop_after_steps": 1, "bf16": {"enabled": False}}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    config = tiny_config(ijepa__run__name="emulated_autocast", **one_step, **autocast)
    assert "--set torch_autocast.enabled=false computes in fp32" in run_training(config, prepare=emulate_bf16).output
    config = tiny_config(ijepa__run__name="emulated_fp32", **one_step)
    assert SAID not in run_training(config, prepare=emulate_bf16).output


def evaluation_output(run: str, beton: str) -> str:
    """What ``evaluate`` prints where bf16 is emulated."""
    from ijepa_ds.evaluation.command import main

    emulate_bf16()
    data = ["--train", beton, "--validation", beton, "--task", "knn", "--random-seeds", "1", "--no-pictures"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(["--checkpoint", run, *data])
    return shown.getvalue()


def test_evaluate_takes_fp32_where_bf16_is_emulated_and_says_so_once():
    (said,) = run_ranks(evaluation_output, 1, str(emulated_run().folder), str(train_beton()))
    assert said.count(SAID) == 1 and "; the evaluation computes in fp32" in said and "margin" in said
