"""Is it right on this device? The sections of the first GPU hour that compare, poison, count and kill."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
import workload
from gpu_findings import Context, OutOfTime
from torch import Tensor
from workload import MadeUpBatch

from ijepa_ds.build import build_ijepa, build_target, input_of_encoder
from ijepa_ds.checks.host_reads import HostReads
from ijepa_ds.config import Config
from ijepa_ds.engine.checkpoint import load
from ijepa_ds.engine.checkpoint_writer import save
from ijepa_ds.engine.plain import Plain
from ijepa_ds.engine.trainable import ShardedTrainable, State
from ijepa_ds.engine.zero import init_distributed
from ijepa_ds.hardware import set_numerics
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.train import build_trainable

CPU = torch.device("cpu")
NOW = Hyperparameters(lr=1e-4, weight_decay=0.05, momentum=0.99)
STILL = Hyperparameters(lr=0.0, weight_decay=0.0, momentum=1.0)


# ---------------------------------------------------------------------------------------------------------- correctness


def correctness(context: Context) -> None:
    """One batch in fp32 against the CPU, a step with a NaN gradient, and going on from a checkpoint."""
    context.attempt("fp32 against the CPU", lambda: against_the_cpu(context))
    context.attempt("a step with a NaN gradient", lambda: nan_step(context))
    context.attempt("going on from a checkpoint", lambda: resume(context))


def against_the_cpu(context: Context) -> None:
    """Loss and gradients of one batch."""
    images = context.size(8, 4)
    name = "tiny" if context.tiny else "vits16_single_gpu"
    sizes = {"train_batch_size": images, "train_micro_batch_size_per_gpu": images}
    config = workload.config_of(name, **sizes, bf16__enabled=False)
    (loss, gradient), (exact_loss, exact) = (loss_and_gradient(config, device) for device in (context.device, CPU))
    norm = torch.cat([values.flatten() for values in exact.values()]).norm()
    error = torch.cat([(gradient[name] - values).flatten() for name, values in exact.items()]).norm() / norm
    worst = max(exact, key=lambda name: float((gradient[name] - exact[name]).norm() / norm))
    loss_error = abs(loss - exact_loss) / exact_loss
    context.found("fp32 loss, error relative to the CPU's", loss_error, "< 1e-5", loss_error < 1e-5)
    context.found(f"fp32 gradients, likewise (worst: {worst})", float(error), "< 1e-4", bool(error < 1e-4))
    config = workload.config_of(name, **sizes, bf16__enabled=True)
    trainable = build_trainable(config, init_distributed())
    batch = workload.batch_of(config, step=1, device=context.device)
    half = float(trainable.step(iter([batch]), STILL).losses[0])
    error = abs(half - exact_loss) / exact_loss
    context.found("bf16 loss of DeepSpeed's engine, likewise", float(error), "< 2e-2", bool(error < 2e-2))


def loss_and_gradient(config: Config, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Of plain torch in fp32, gradients by name on the CPU."""
    set_numerics(low_precision=False, deterministic=False)  # no TF32
    trainable = plain_of(config, device)
    gradients: dict[str, Tensor] = {}

    def keep(found: dict[str, Tensor]) -> None:
        gradients.update({name: values.cpu().clone() for name, values in found.items()})

    trainable.watch_gradients = keep
    outcome = trainable.step(iter([workload.batch_of(config, step=1, device=device)]), STILL)
    return float(outcome.losses[0]), gradients


def plain_of(config: Config, device: torch.device) -> Plain:
    """A configuration on plain torch, from the same initial weights as on DeepSpeed's engine."""
    optimization, to_input = config.ijepa.optimization, input_of_encoder(config, device, torch.float32)
    adam: dict[str, Any] = {"betas": optimization.betas, "eps": optimization.eps}
    return Plain(build_ijepa(config), build_target(config), **adam, to_input=to_input, device=device)


def nan_step(context: Context) -> None:
    """Masters, moments, average and counters must be as before, and the next step must move them."""
    config = workload.config_of("tiny", bf16__enabled=True, zero_optimization__overlap_comm=True)
    trainable = build_trainable(config, init_distributed())
    batches = [workload.batch_of(config, step=step, device=context.device) for step in range(3)]
    trainable.step(iter(batches[:1]), NOW)
    before = copy_of(trainable.state())
    poisoned = dict(trainable.module.named_parameters())["predictor.predictor_proj.bias"]
    hook = poisoned.register_hook(lambda gradient: gradient * float("nan"))
    outcome = trainable.step(iter(batches[1:2]), NOW)
    hook.remove()
    applied, after = bool(outcome.applied), copy_of(trainable.state())
    changed = [name for name, values in before.items() if not torch.equal(values, after[name])]
    holds = not applied and not changed
    context.found("a NaN step is skipped; state that changed", ", ".join(changed) or "none", "none", holds)
    outcome = trainable.step(iter(batches[2:]), NOW)
    moved = [name for name, values in copy_of(trainable.state()).items() if not torch.equal(values, after[name])]
    finite = bool(outcome.applied) and bool(outcome.losses.isfinite().all())
    value = f"{len(moved)} of {len(after)} parts moved, loss {float(outcome.losses[0]):.3f}"
    context.found("the step after it", value, "all move", finite and len(moved) == len(after))


def copy_of(state: State) -> dict[str, Tensor]:
    """Everything of a state, by kind and place."""
    copies = {
        f"{kind} {index}": values.detach().clone()
        for kind, slices in state.slices.items()
        for index, (_, values) in enumerate(slices)
    }
    counters = {f"counter {group}": torch.stack([c.cpu() for c in found]) for group, found in state.adam_steps.items()}
    return copies | counters


def resume(context: Context) -> None:
    """Six steps at once against three, a checkpoint, another engine, three."""
    process = init_distributed()
    config = workload.config_of("tiny", bf16__enabled=True, zero_optimization__overlap_comm=True)
    batches = [workload.batch_of(config, step=step, device=context.device) for step in range(6)]
    first = build_trainable(config, process)
    for batch in batches[:3]:
        first.step(iter([batch]), NOW)
    path = save(context.folder / "checkpoints", 3, first.state(), process, keep=1)
    losses = [float(first.step(iter([batch]), NOW).losses[0]) for batch in batches[3:]]
    second = build_trainable(config, process)
    step = load(path, second.state(), process)
    second.publish()
    again = [float(second.step(iter([batch]), NOW).losses[0]) for batch in batches[step:]]
    difference = max(abs(a - b) / a for a, b in zip(losses, again, strict=True))
    ends = copy_of(first.state()), copy_of(second.state())
    equal = all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())
    context.found("losses after a resume, largest relative difference", difference, "< 1e-3", difference < 1e-3)
    context.found("the state after it is bit for bit the same", equal, "not promised on a GPU")


# --------------------------------------------------------------------------------------------------------------- canary


def canary(context: Context) -> None:
    """Trajectories that must agree: overlap_comm on, again, off, ZeRO 1, plain torch; accumulation 1 and 4."""
    steps = context.size(200, 3)
    for precision, accumulation in (("fp32", 1), ("bf16", 1), ("fp32", 4), ("bf16", 4)):
        compare = functools.partial(compare_trajectories, context, precision, accumulation, steps)
        context.attempt(f"canary, {precision}, accumulation {accumulation}", compare, needs=10)


def compare_trajectories(context: Context, precision: str, accumulation: int, steps: int) -> None:
    """Losses of each variant against those of the first; a run of the first again tells what noise does."""
    width = context.size(192, 32)
    shared = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 32 // accumulation,
        "bf16__enabled": precision == "bf16",
        # Small ones, so that many reductions overlap with the backward pass.
        "zero_optimization__reduce_bucket_size": 50_000,
        "ijepa__model__width": width,
        "ijepa__model__depth": context.size(4, 2),
    }
    config = workload.config_of("tiny", **shared)
    batches = [workload.batch_of(config, step=step, device=context.device, size=32) for step in range(8)]
    variants = {
        "overlap_comm": {"zero_optimization__overlap_comm": True},
        "overlap_comm, again": {"zero_optimization__overlap_comm": True},
        "no overlap_comm": {"zero_optimization__overlap_comm": False},
        "ZeRO 1": {"zero_optimization__stage": 1},
    }
    losses: dict[str, Tensor] = {}
    for name, changes in variants.items():
        trainable = build_trainable(workload.config_of("tiny", **shared, **changes), init_distributed())
        losses[name] = trajectory(context, trainable, batches, steps, 32 // accumulation)
    if precision == "fp32":
        losses["plain torch"] = trajectory(
            context, plain_of(config, context.device), batches, steps, 32 // accumulation
        )
    first = losses.pop("overlap_comm")
    differences = {name: float(((other - first) / first).abs().max()) for name, other in losses.items()}
    noise = differences["overlap_comm, again"]
    bound = max(10 * noise, 1e-3 if precision == "fp32" else 2e-2)
    for name, difference in differences.items():
        what = f"{precision}, accumulation {accumulation}: '{name}' against overlap_comm over {steps} steps"
        context.found(what, difference, f"< {bound:.1g}", difference < bound)
    fell = float(first[-8:].mean() / first[:8].mean())
    holds = None if context.tiny else fell < 1  # so few steps tell nothing
    context.found(f"{precision}, accumulation {accumulation}: last losses over first", fell, "< 1", holds)


def trajectory(
    context: Context, trainable: ShardedTrainable, batches: list[MadeUpBatch], steps: int, micro_batch: int
) -> Tensor:
    """The loss of each step, on the CPU; they stay on the device until the end."""
    losses = []
    for _, batch in zip(range(steps), itertools.cycle(batches)):
        losses.append(trainable.step(workload.micro_batches(batch, micro_batch), NOW).losses.mean())
        if context.left() < 0:
            raise OutOfTime(f"{len(losses)} of {steps} steps")
    return torch.stack(losses).double().cpu()


# ----------------------------------------------------------------------------------------------------------- host reads


def host_reads(context: Context) -> None:
    """What a step makes the host wait for, and a pass of the whole loop; on a GPU under torch's own error mode too."""
    for accumulation in (1, 4):
        count = functools.partial(reads_of_a_step, context, accumulation)
        context.attempt(f"host reads of a step, accumulation {accumulation}", count)
    # Last: an error within leaves the mode that looks behind.
    context.attempt("host reads of a pass of the loop", lambda: reads_of_the_loop(context))


def report_reads(context: Context, what: str, reads: list[str]) -> None:
    """None are wanted; each place is told once."""
    context.found(what, "; ".join(sorted(set(reads))) or 0, "0", not reads)


def reads_of_a_step(context: Context, accumulation: int) -> None:
    """Of one step with batches that lie on the device, after three that make the buffers."""
    from deepspeed.accelerator import get_accelerator

    size = 8 // accumulation
    settings = {"bf16__enabled": True, "zero_optimization__overlap_comm": True, "train_micro_batch_size_per_gpu": size}
    config = workload.config_of("tiny", **settings)
    trainable = build_trainable(config, init_distributed())
    batch = workload.batch_of(config, step=1, device=context.device, size=8)
    for _ in range(3):
        trainable.step(workload.micro_batches(batch, size), NOW)
    measure.wait(context.device)
    with HostReads(get_accelerator()) as reads:
        trainable.step(workload.micro_batches(batch, size), NOW)
    report_reads(context, f"host reads of a step, accumulation {accumulation}", reads.found)


def reads_of_the_loop(context: Context) -> None:
    """Of each pass of a training run between its third step and its last: loader, step and what follows it."""
    from deepspeed.accelerator import get_accelerator

    from ijepa_ds import train
    from ijepa_ds.data.pretraining_loader import PretrainingLoader

    original, found = PretrainingLoader.from_step, []

    def from_step(self: PretrainingLoader, step: int, end: int, device: Any) -> Iterator:
        for number, batches in enumerate(original(self, step, end, device)):
            if not 2 <= number < end - 1:  # the last one logs
                yield batches
                continue
            with HostReads(get_accelerator()) as reads:
                yield batches
            found.append(reads.found)

    settings = {"bf16__enabled": True, "zero_optimization__overlap_comm": True, "ijepa__monitor__log_steps": 1000}
    path = training_file(context, "host_reads", 10, **settings)
    PretrainingLoader.from_step = from_step  # type: ignore[method-assign]
    try:
        train.main(["--config", str(path)])
    finally:
        PretrainingLoader.from_step = original  # type: ignore[method-assign]
    reads = [read for step in found for read in step]
    report_reads(context, f"host reads of {len(found)} passes of the loop", reads)


def training_file(context: Context, name: str, stop_after_steps: int, **changes: Any) -> Path:
    """A configuration of a short run on the section's images, as a file."""
    shared: dict[str, Any] = {
        "ijepa__run__name": name,
        "ijepa__run__folder": str(context.folder / "runs"),
        "ijepa__run__stop_after_steps": stop_after_steps,
        "ijepa__data__train": str(context.dataset()),
        "ijepa__data__workers": context.size(4, 1),
    }
    path = context.folder / f"{name}.config.json"
    path.write_text(json.dumps(workload.raw_tiny(**shared, **changes)))
    return path


# ------------------------------------------------------------------------------------------------------ kill and resume


def kill(context: Context) -> None:
    """kill -9 of a run started by the real command line, and the same command again."""
    context.attempt("kill -9, and the same command again", lambda: kill_and_go_on(context))


def kill_and_go_on(context: Context) -> None:
    """What the second start must show: the first one's steps, from a checkpoint on."""
    every, last = 4, context.size(200, 24)
    path = training_file(context, "killed", last, bf16__enabled=True, ijepa__checkpoint__steps=every)
    command = [sys.executable, "run.py", "--config", str(path)]
    before = killed_run(context, command, after=every + 2)
    patience = max(5.0, context.left())
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, timeout=patience)
    after = {row["step"]: row["loss"] for row in rows_of(context)}
    resumed = "going on from step" in done.stdout
    holds = done.returncode == 0 and resumed and sorted(after) == list(range(1, last + 1))
    value = f"exit {done.returncode}, resumed: {resumed}, {len(after)} of {last} steps logged"
    context.found("kill -9, and the same command again", value, f"exit 0, {last} steps", holds)
    worst = max(abs(before[step] - after[step]) / before[step] for step in before if step in after)
    context.found("losses before the kill and after, largest difference", worst, "< 1e-3", worst < 1e-3)


def killed_run(context: Context, command: list[str], *, after: int) -> dict[int, float]:
    """Start a run, kill it once ``after`` steps are logged; the losses until then, by step."""
    with open(context.folder / "killed.log", "w") as log:
        run = subprocess.Popen(command, cwd=measure.ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            while len(rows_of(context)) < after:
                if run.poll() is not None:
                    raise RuntimeError((context.folder / "killed.log").read_text()[-400:])
                if context.left() < 0:
                    raise OutOfTime("the run had not got so far")
                time.sleep(0.02)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    return {row["step"]: row["loss"] for row in rows_of(context)}


def rows_of(context: Context) -> list[dict[str, Any]]:
    """The whole lines of the run's log so far."""
    file = context.folder / "runs" / "killed" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
