"""How fast is this device, and how much memory does it take? The sections of the first GPU hour that measure."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ema
import measure
import peak
import plain_ijepa
import torch
import torch.nn.functional as F
import workload
from gpu_findings import Context
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import MadeUpBatch

from ijepa_ds.build import build_ijepa, build_loader, build_sampler, computing_dtype, encoder_dimensions, shapes_of
from ijepa_ds.config import Config
from ijepa_ds.data.beton import inspect_dataset
from ijepa_ds.engine.trainable import Trainable
from ijepa_ds.engine.warm_up import Shapes, compile_and_warm_up
from ijepa_ds.engine.zero import Zero, init_distributed
from ijepa_ds.hardware import peak_flops
from ijepa_ds.method.ijepa import normalize_images
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.train import build_trainable

NOW = Hyperparameters(lr=1e-4, weight_decay=0.05, momentum=0.99)
# File of ds_configs/ -> images of a step on one device; peak memory at the largest T, GB, eager and compiled, as
# `python -m ijepa_ds plan` predicts it.
MODELS: dict[str, tuple[int, tuple[float, float] | None]] = {
    "vits16_single_gpu": (256, (8.6, 8.6)),
    "vitb16": (256, None),
    "vitl16": (128, None),
    "vith14": (128, (39.9, 39.9)),
}
OURS, COMPILED, PLAIN = "ours, eager", "ours, compiled", "plain"
DEEPSPEED_WAITS = "ours, eager, with DeepSpeed's own checks and timers"


# --------------------------------------------------------------------------------------------------------------- device


def device(context: Context) -> None:
    """The peaks that the other sections are shares of."""
    context.attempt("products", lambda: products(context))
    context.attempt("copies", lambda: copies(context))
    context.attempt("moving average", lambda: moving_average(context))


def products(context: Context) -> None:
    """The peak of each precision that a run may compute in."""
    for dtype in (torch.bfloat16, torch.float32):
        rate = peak_flops(context.device, dtype)
        context.found(f"fastest {str(dtype).removeprefix('torch.')} product, TFLOP/s", rate / 1e12)


def copies(context: Context) -> None:
    """Within the device and to it."""
    rates = peak.copy_rates(context.size(2_000_000_000, 1_000_000), context.device, seconds=0.2)
    for name, rate in rates.items():
        context.found(f"copy: {name}, GB/s", rate)


def moving_average(context: Context) -> None:
    """See ema.py."""
    options = argparse.Namespace(device=context.device, rounds=context.size(20, 1))
    encoder = "tiny" if context.tiny else "huge"
    result = ema.compare(ema.shapes_of(encoder, 14), torch.bfloat16, options)
    share = result["share_of_copy_bandwidth"]
    context.found(f"moving average of {encoder}: share of the copy's bandwidth", share, "about 1")
    context.found("moving average: tensor by tensor over ours", result["loop_over_ours"], "> 1")


# --------------------------------------------------------------------------------------------------- memory, step times


def model(context: Context, name: str) -> None:
    """Peak memory at the largest T, then the time of a step at the mean T: eager, compiled, plain."""
    images, predicted = MODELS[name]
    images = context.size(images, 4)
    config_name = "tiny" if context.tiny else name
    sizes = {"train_batch_size": images, "train_micro_batch_size_per_gpu": images, "bf16__enabled": True}
    config = workload.config_of(config_name, **sizes)
    began = time.monotonic()
    trainable = build_trainable(config, init_distributed())
    context.found(f"{name}: seconds to build it", time.monotonic() - began)
    sides = [OURS]
    for side, wanted in zip((OURS, COMPILED), predicted or (None, None), strict=True):
        if side == COMPILED:
            compiling = functools.partial(compile_ours, context, config, trainable, name, sides)
            context.attempt(f"{name}: compilation", compiling)
        if side in sides:
            memory = functools.partial(measure_memory, context, config, trainable, f"{name}, {side}", side, wanted)
            context.attempt(f"{name}, {side}: memory", memory)
    context.attempt(f"{name}: step times", lambda: compare_steps(context, config, trainable, name, sides))
    if name == "vits16_single_gpu":
        waits = functools.partial(compare_with_deepspeed_waits, context, config, trainable, config_name, sizes)
        context.attempt(f"{name}: {DEEPSPEED_WAITS}", waits, needs=15)


def compile_ours(context: Context, config: Config, trainable: Zero, name: str, sides: list[str]) -> None:
    """Compile for the two shapes that are measured, as a run does for all of its own; adds a side."""
    sampler = build_sampler(config)
    mean = sampler.block_sizes(mean_step(config)).target_tokens
    batch = workload.batch_of(config, step=mean_step(config), device=context.device, size=1)
    shapes = Shapes(
        num_images=config.micro_batch,
        image_size=config.ijepa.data.image_size,
        context_tokens=batch.context_block.shape[1],
        num_targets=sampler.num_targets,
        target_tokens=sorted({sampler.max_target_tokens(), mean}, reverse=True),
    )
    # Compiling for a CPU takes minutes and tells nothing of a GPU: the rehearsal traces alone.
    backend = "inductor" if context.device.type == "cuda" else "eager"
    began = time.monotonic()
    compile_and_warm_up(trainable, shapes, init_distributed(), backend=backend)
    torch.compiler.set_stance("default")
    told = f"{name}: seconds to compile for T = {', '.join(map(str, shapes.target_tokens))}"
    context.found(told, time.monotonic() - began)
    sides.append(COMPILED)


@contextmanager
def eager_if(side: str) -> Iterator[None]:
    """The same modules without their compiled code, where ``side`` is the eager one."""
    if side == COMPILED:
        yield
        return
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def measure_memory(
    context: Context, config: Config, trainable: Trainable, what: str, side: str, predicted: float | None
) -> None:
    """The peak of two steps at the largest number of target tokens."""
    sampler = build_sampler(config)
    step = workload.step_with(sampler, sampler.max_target_tokens())
    batch = workload.batch_of(config, step=step, device=context.device)
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    with eager_if(side):
        for _ in range(2):
            trainable.step(iter([batch]), NOW)
    measure.wait(context.device)
    context.found(f"{what}: seconds of the first two steps", time.monotonic() - began)
    if context.device.type != "cuda":
        return
    peak_gb = torch.cuda.max_memory_allocated() / 1e9
    free, total = torch.cuda.mem_get_info()
    expected = f"{predicted} predicted, 1.5 of it outside" if predicted else ""
    # A prediction holds where it is not a tenth too low.
    holds = None if predicted is None else peak_gb + 1.5 < 1.1 * predicted
    context.found(f"{what}: peak GB allocated at T = {batch.target_blocks.shape[2]}", peak_gb, expected, holds)
    context.found(f"{what}: GB of the device in use", (total - free) / 1e9)


def compare_steps(context: Context, config: Config, trainable: Trainable, name: str, ours: list[str]) -> None:
    """Ours eager and compiled in turns; then the faster one and the method written plainly, if that fits beside it."""
    batch = workload.batch_of(config, step=mean_step(config), device=context.device)
    timing = {"rounds": context.size(5, 1), "times": context.size(2, 1), "device": context.device}
    sides = {side: step_of(side, trainable, batch) for side in ours}
    seconds = measure.in_turns(sides, **timing)
    for side, taken in seconds.items():
        report_step(context, config, batch, f"{name}, {side}", taken)
    if COMPILED in ours:
        context.found(f"{name}: eager over compiled", measure.ratio(seconds, OURS, COMPILED), "> 1")
    fastest, images = ours[-1], config.micro_batch
    plain = plain_step(config, context.device)
    while True:
        batch = workload.batch_of(config, step=mean_step(config), device=context.device, size=images)
        sides = {fastest: step_of(fastest, trainable, batch), PLAIN: functools.partial(plain, batch)}
        try:
            seconds = measure.in_turns(sides, **timing)
            break
        except torch.OutOfMemoryError:
            context.found(f"{name}: {images} images with the plain method beside ours", "out of memory")
            images //= 2
            torch.cuda.empty_cache()
    report_step(context, config, batch, f"{name}, {PLAIN}", seconds[PLAIN])
    context.found(f"{name}: plain over '{fastest}'", measure.ratio(seconds, PLAIN, fastest), "> 1")


def report_step(context: Context, config: Config, batch: MadeUpBatch, what: str, seconds: list[float]) -> None:
    """Time, rate and share of the peak of a side."""
    blocks, images, tokens = batch.target_blocks.shape
    kept, median = batch.context_block.shape[1], statistics.median(seconds)
    flops = images * shapes_of(config).flops(context_tokens=kept, target_tokens=tokens, num_targets=blocks).total
    best = peak_flops(context.device, computing_dtype(config))
    context.found(f"{what}: ms a step of {images} images, T = {tokens}", 1e3 * median)
    context.found(f"{what}: images/s", images / median)
    context.found(f"{what}: share of the measured peak", flops / median / best)


def mean_step(config: Config) -> int:
    """A step whose number of target tokens is nearest to the mean."""
    sampler = build_sampler(config)
    tokens = [sampler.block_sizes(step).target_tokens for step in range(500)]
    mean = statistics.mean(tokens)
    return min(range(500), key=lambda step: abs(tokens[step] - mean))


def step_of(side: str, trainable: Trainable, batch: MadeUpBatch) -> Callable[[], Tensor]:
    """A step of ours on a batch: the loss, on the device."""

    def step() -> Tensor:
        with eager_if(side):
            return trainable.step(iter([batch]), NOW).losses[0]

    return step


def plain_step(config: Config, device: torch.device) -> Callable[[MadeUpBatch], Tensor]:
    """A step of the method written plainly, from the same weights and pixels, in bf16 with fp32 masters."""
    weights, sizes, model = build_ijepa(config), encoder_dimensions(config), config.ijepa.model
    heads = {"depth": sizes.depth, "heads": sizes.heads}
    encoder = plain_ijepa.Encoder(config.grid, model.patch_size, width=sizes.width, hidden=sizes.hidden, **heads)
    narrow = {"depth": model.predictor_depth, "heads": model.predictor_heads or sizes.heads}
    predictor = plain_ijepa.Predictor(config.grid, sizes.width, width=model.predictor_width, **narrow)
    encoder.load_state_dict(weights.context_encoder.state_dict())
    predictor.load_state_dict(weights.predictor.state_dict())
    adam: dict[str, Any] = {"betas": config.ijepa.optimization.betas, "eps": config.ijepa.optimization.eps}
    now = {"lr": NOW.lr, "weight_decay": NOW.weight_decay, "momentum": NOW.momentum}
    trainer = plain_ijepa.HalfPrecisionTrainer(encoder.to(device), predictor.to(device), **adam, **now)
    mean, std = (torch.tensor(values, device=device) for values in (config.ijepa.data.mean, config.ijepa.data.std))
    to_input = functools.partial(normalize_images, mean=mean, std=std, dtype=torch.bfloat16)
    return lambda batch: trainer.step(to_input(batch.images), batch.context_block, batch.target_blocks)


def compare_with_deepspeed_waits(
    context: Context, config: Config, trainable: Trainable, name: str, sizes: dict[str, Any]
) -> None:
    """The first row of the waterfall: what DeepSpeed does unless told otherwise."""
    waits = {
        "timers": {"throughput": {"enabled": True}},
        "bf16__check_grad_overflow": True,
        "zero_optimization__compute_grad_norm": True,
        "zero_optimization__reduce_bucket_size": 500_000_000,
    }
    waiting = build_trainable(workload.config_of(name, **sizes, **waits), init_distributed())
    batch = workload.batch_of(config, step=mean_step(config), device=context.device)
    steps = {OURS: step_of(OURS, trainable, batch), DEEPSPEED_WAITS: step_of(OURS, waiting, batch)}
    rounds, times = context.size(5, 1), context.size(4, 1)
    seconds = measure.in_turns(steps, rounds=rounds, device=context.device, times=times)
    context.found(f"{name}: '{DEEPSPEED_WAITS}' over '{OURS}'", measure.ratio(seconds, DEEPSPEED_WAITS, OURS), ">= 1")


# ------------------------------------------------------------------------------------------------------------ attention


def attention(context: Context) -> None:
    """Forward and backward of scaled dot-product attention by back end, at the heads and lengths of ViT-H, g and S."""
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    images = context.size(128, 2)
    cases = [(80, 16, 72, images), (80, 16, 256, images), (88, 16, 55, images), (24, 16, 117, 4 * images)]
    for head, heads, length, sequences in cases:
        shape = f"head {head}, {length} tokens, {sequences} sequences x {heads} heads"
        times: dict[str, float] = {}
        for name, backend in backends.items():
            try:
                times[name] = attention_seconds(context, backend, (sequences, length, heads, head))
            except RuntimeError as error:  # a back end that does not take this
                context.found(f"attention, {shape}: {name}", f"not available: {str(error)[:60]}")
        told = ", ".join(f"{name} {1e6 * taken:.0f}" for name, taken in sorted(times.items(), key=lambda i: i[1]))
        context.found(f"attention, {shape}: us forward and backward", told)


def attention_seconds(context: Context, backend: SDPBackend, shape: tuple[int, int, int, int]) -> float:
    """Median seconds; q, k and v are the strided views of one product that timm's blocks hand over."""
    sequences, length, heads, head = shape
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    qkv = torch.randn(sequences, length, 3, heads, head, device=context.device, dtype=dtype, requires_grad=True)
    weights = torch.randn(sequences, heads, length, head, device=context.device, dtype=dtype)

    def call() -> None:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(query, key, value).backward(weights)
        qkv.grad = None

    taken = measure.in_turns({"": call}, rounds=context.size(10, 1), device=context.device, times=context.size(5, 1))
    return statistics.median(taken[""])


# --------------------------------------------------------------------------------------------------------------- loader


def loader(context: Context) -> None:
    """Images a second that arrive on the device, by loading threads, at 224 px."""
    dataset = inspect_dataset(str(context.dataset()))
    context.found("loader: images", f"{dataset.num_samples} of {dataset.path}")
    cores = len(os.sched_getaffinity(0))
    for workers in sorted({min(count, cores) for count in context.size((1, 4, 8, 12, 16), (1,))}):
        measurement = functools.partial(measure_loading, context, dataset, workers)
        context.attempt(f"loader, {workers} threads", measurement, needs=5)


def measure_loading(context: Context, dataset: Any, workers: int) -> None:
    """One number of loading threads."""
    batch = context.size(256, 8)
    name = "tiny" if context.tiny else "vits16_single_gpu"
    sizes = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": batch}
    config = workload.config_of(name, **sizes, ijepa__data__workers=workers)
    rate = loading_rate(context, config, dataset, steps=context.size(40, 4))
    context.found(f"loader, {workers} threads: images/s on the device", rate)


def loading_rate(context: Context, config: Config, dataset: Any, *, steps: int) -> float:
    """Images a second over the last steps; the first ones start threads and fill buffers."""
    reader = argparse.Namespace(data_rank=0, data_ranks=1)
    loading = build_loader(config, dataset, build_sampler(config), reader)
    skipped, began, images = max(1, steps // 4), 0.0, 0
    for number, batches in enumerate(loading.from_step(0, steps, context.device)):
        for batch in batches:
            images += len(batch.images) * (number >= skipped)
        measure.wait(context.device)
        if number == skipped - 1:
            began = time.perf_counter()
    return images / (time.perf_counter() - began)
