"""Replay a recorded run of another implementation through the code that trains here, and compare what comes out.

``python -m ijepa_ds replay TRACE.npz`` takes the method, the optimizer and the target encoder alone; ``--engine`` the
DeepSpeed engine too, on as many processes as the launcher starts.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from ijepa_ds.build import autocast_dtype, check_batch, working_dtype
from ijepa_ds.checks.recorded_run import Trace, read_trace
from ijepa_ds.config import Config, parse_config
from ijepa_ds.distributed import Process, max_over_ranks, mean_over_ranks
from ijepa_ds.engine.plain import Plain
from ijepa_ds.engine.trainable import TARGET
from ijepa_ds.engine.zero import Zero, init_distributed
from ijepa_ds.errors import UserError
from ijepa_ds.meeting import join, own_ranks
from ijepa_ds.method.encoder import set_attention
from ijepa_ds.method.ijepa import CONTEXT_ENCODER, IJEPA, PREDICTOR, normalize_targets
from ijepa_ds.method.schedules import Schedules, build_schedules

# In fp32; the schedules are arithmetic in double precision.
RELATIVE_TOLERANCES = {
    "loss": 1e-5,
    "lr": 1e-9,
    "weight_decay": 1e-9,
    "momentum": 1e-9,
    "grad_norm_encoder": 1e-4,
    "grad_norm_predictor": 1e-4,
}
FEATURE_TOLERANCE = 1e-4  # absolute, step 0
WEIGHT_TOLERANCE = 2e-5  # absolute, final
_PARTS = {CONTEXT_ENCODER: "encoder", PREDICTOR: "predictor"}  # our name -> the trace's
_ALL_PARTS = (*_PARTS.values(), "target_encoder")


class AdamSettings(TypedDict):
    """Of the released code's AdamW."""

    betas: tuple[float, float]
    eps: float


@dataclass
class Inputs:
    """A recorded batch: images [B, 3, H, W], normalised; context block [B, K]; target blocks [M, B, T]."""

    images: Tensor
    context_block: Tensor
    target_blocks: Tensor
    keys: Tensor | None = None


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds replay``; returns 1 where the differences are beyond the tolerances."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds replay",
        description="Replay a recorded run (NAME.npz with NAME.json beside it) and compare. Exit code 0 within the "
        "tolerances, 1 beyond them. On two processes: deepspeed --num_gpus 2 --module ijepa_ds replay --engine ...",
    )
    parser.add_argument("trace", help="the .npz of a trace")
    parser.add_argument("--engine", action="store_true", help="through DeepSpeed ZeRO-2, as training goes")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "autocast"),
        default="fp32",
        help="other than fp32: through the engine, differences are reported and not judged",
    )
    options = parser.parse_args(arguments)
    try:
        trace = read_trace(Path(options.trace))
    except UserError as error:
        join().leave(error)
    through_engine = options.engine or options.precision != "fp32"
    if through_engine:
        process = init_distributed()
    else:
        if not own_ranks().alone:
            mistake = "several processes need --engine; without it start one: python -m ijepa_ds replay TRACE.npz"
            join().leave(UserError(mistake))
        process = Process(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return replay(trace, process, engine=through_engine, precision=options.precision)


def replay(trace: Trace, process: Process, *, engine: bool, precision: str) -> int:
    """Print the comparison; returns the exit code."""
    say = print if process.is_main else lambda *_, **__: None
    trainable = build_trainable(trace, process, engine=engine, precision=precision)
    replayed = Replay(trace, trainable, process)
    judged = precision == "fp32" and trace.settings.dtype == "float32"
    where = f"DeepSpeed ZeRO-2 on {process.world_size} processes" if engine else "without DeepSpeed"
    say(f"{trace.path}: {len(trace.settings.steps)} steps of {trace.settings.batch_size} images; {where}, {precision}")
    worst = _Worst(judged)
    say(f"\n{'step':>6}  {'':<22}{'ours':>20}{'recorded':>20}{'relative':>12}")
    features: dict[str, float] = {}
    for step in range(len(trace.settings.steps)):
        inputs = _inputs(trace, step, process)
        if step == 0:
            features = replayed.feature_differences(inputs)
        ours, recorded = replayed.step(step, inputs), trace.settings.steps[step].model_dump()
        for name, tolerance in RELATIVE_TOLERANCES.items():
            difference = _relative(ours[name], recorded[name])
            worst.note(f"step {step}: {name}", difference, tolerance)
            say(f"{step:>6}  {name:<22}{ours[name]:>20.12g}{recorded[name]:>20.12g}{difference:>12.1e}", flush=True)

    say("\nlargest absolute difference, step 0")
    for name, difference in features.items():
        worst.note(f"step 0: {name}", difference, FEATURE_TOLERANCE)
        say(f"  {name:<66}{difference:>12.1e}")
    say("\nlargest absolute difference of the final weights")
    for name, difference in replayed.final_differences().items():
        worst.note(f"final: {name}", difference, WEIGHT_TOLERANCE)
        say(f"  {name:<66}{difference:>12.1e}")
    say(f"\n{worst.verdict()}", flush=True)
    return worst.exit_code


class _Worst:
    """What lies furthest beyond, or closest to, its tolerance."""

    def __init__(self, judged: bool):
        self.judged, self.name, self.difference, self.tolerance = judged, "", 0.0, 1.0
        self._share, self._beyond = -1.0, 0

    def note(self, name: str, difference: float, tolerance: float) -> None:
        share = math.inf if math.isnan(difference) else difference / tolerance
        self._beyond += share > 1
        if share > self._share:
            self._share, self.name, self.difference, self.tolerance = share, name, difference, tolerance

    @property
    def exit_code(self) -> int:
        return int(self.judged and self._beyond > 0)

    def verdict(self) -> str:
        what = f"{self.name} differs by {self.difference:.2e} (tolerance {self.tolerance:.0e})"
        if not self.judged:
            return f"not judged: the tolerances are those of fp32. Worst: {what}"
        if self._beyond:
            return f"BEYOND the tolerance in {self._beyond} places. Worst: {what}"
        return f"within every tolerance. Closest to its own: {what}"


class Replay:
    """A trainable that takes the recorded steps, with what a trace records of each."""

    def __init__(self, trace: Trace, trainable: Plain | Zero, process: Process) -> None:
        self.trace, self.trainable, self.process = trace, trainable, process
        self.schedules = _schedules(trace)
        self._squares: dict[str, float] = {}
        trainable.watch_gradients = self._note_gradients

    def step(self, step: int, inputs: Inputs) -> dict[str, float]:
        """One optimizer step; what a trace records of it."""
        now = self.schedules.at(step)
        outcome = self.trainable.step(iter([inputs]), now)
        return {
            "loss": mean_over_ranks(outcome.losses.mean(), self.process),
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            **{f"grad_norm_{part}": math.sqrt(square) for part, square in self._squares.items()},
        }

    @torch.no_grad()
    def feature_differences(self, inputs: Inputs) -> dict[str, float]:
        """Largest absolute difference of what the networks give before the first step."""
        trace, module = self.trace, self.trainable.module
        share = _share(trace.settings.batch_size, self.process)
        predictions = trace.tensor("step0/predictions")  # [M * B, T, D], block-major
        predictions = predictions.unflatten(0, (trace.settings.targets, -1))[:, share].flatten(0, 1)
        images = self.trainable.to_input(inputs.images)
        pairs = {
            "target_features": (
                normalize_targets(self.trainable.features(inputs.images)),
                trace.tensor("step0/target_features")[share],
            ),
            "context_features": (
                module.context_encoder(images, inputs.context_block),
                trace.tensor("step0/context_features")[share],
            ),
            "predictions": (module.predict(images, inputs.context_block, inputs.target_blocks), predictions),
        }
        differences = [largest(ours, recorded) for ours, recorded in pairs.values()]
        return dict(zip(pairs, max_over_ranks(differences, self.process), strict=True))

    def final_differences(self) -> dict[str, float]:
        """Largest absolute difference of every tensor from its recorded end, of the fp32 masters and averages."""
        recorded = {f"{part}/{n}": w for part in _ALL_PARTS for n, w in self.trace.weights("final", part).items()}
        differences = dict.fromkeys(recorded, 0.0)
        slices = self.trainable.state().slices
        for kind, parts in (("master", _PARTS), (TARGET, {CONTEXT_ENCODER: "target_encoder"})):
            for shard, values in slices[kind]:
                for piece in shard.pieces():
                    prefix, _, name = piece.name.partition(".")
                    key = f"{parts[prefix]}/{name}"
                    end = recorded[key].reshape(-1)[piece.start : piece.stop]
                    differences[key] = max_or_nan(differences[key], largest(piece.of(values), end))
        module = self.trainable.module
        networks = (module.context_encoder, module.predictor, self.trainable.target_encoder.encoder)
        for part, network in zip(_ALL_PARTS, networks, strict=True):  # the fixed positions, which no optimizer holds
            for name, parameter in network.named_parameters():
                if name.endswith("pos_embed"):
                    differences[f"{part}/{name}"] = largest(parameter, recorded[f"{part}/{name}"])
        return dict(zip(differences, max_over_ranks(list(differences.values()), self.process), strict=True))

    def _note_gradients(self, gradients: dict[str, Tensor]) -> None:
        self._squares = dict.fromkeys(_PARTS.values(), 0.0)
        for name, gradient in gradients.items():
            self._squares[_PARTS[name.partition(".")[0]]] += float(gradient.double().square().sum())


def build_trainable(trace: Trace, process: Process, *, engine: bool, precision: str) -> Plain | Zero:
    """What takes the recorded steps, from the recorded initial weights."""
    encoder, predictor = trace.build()
    encoder.load_state_dict(trace.weights("init", "encoder"))
    predictor.load_state_dict(trace.weights("init", "predictor"))
    model = IJEPA(encoder, predictor)
    set_attention(model, fused=torch.cuda.is_available())  # as training has it
    with torch.device("meta"):
        target, _ = trace.build()
    adam: AdamSettings = {"betas": (0.9, 0.999), "eps": 1e-8}
    if not engine:
        return Plain(model, target, to_input=lambda images: images, device=process.device, **adam)
    config = _config(trace, process, precision)
    check_batch(config, process)
    dtype = working_dtype(config)
    return Zero(
        model,
        target,
        process,
        settings=config.deepspeed,
        to_input=lambda images: images.to(dtype),
        autocast=autocast_dtype(config),
        **adam,
    )


def _schedules(trace: Trace) -> Schedules:
    recipe = trace.settings
    return build_schedules(
        steps_per_epoch=recipe.iterations_per_epoch,
        epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        schedule_scale=recipe.ipe_scale,
        lr_start=recipe.lr.start,
        lr_peak=recipe.lr.peak,
        lr_final=recipe.lr.final,
        weight_decay=recipe.weight_decay,
        momentum=recipe.ema,
    )


def _config(trace: Trace, process: Process, precision: str) -> Config:
    """What the engine reads of a configuration; the model is built from the trace itself."""
    batch = trace.settings.batch_size
    raw = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": max(1, batch // process.world_size),
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": precision == "bf16"},
        "torch_autocast": {"enabled": precision == "autocast", "dtype": "bfloat16"},
        "ijepa": {
            "run": {"name": "replay"},
            "data": {"train": str(trace.path), "image_size": list(trace.settings.image_size)},
            "model": {"patch_size": trace.settings.patch_size},
        },
    }
    if batch % process.world_size:
        mistake = f"{trace.path}: {batch} images do not divide into {process.world_size} processes"
        join().leave(UserError(f"{mistake}; start a number that does"))
    return parse_config(raw, source=str(trace.path))


def _inputs(trace: Trace, step: int, process: Process) -> Inputs:
    """This process's share of a recorded batch."""
    images = trace.tensor(f"step{step}/images")
    context_block = trace.tensor(f"step{step}/context_masks")[0]
    target_blocks = trace.tensor(f"step{step}/target_masks")
    share = _share(len(images), process)
    parts = (images[share], context_block[share], target_blocks[:, share])
    return Inputs(*(part.to(process.device) for part in parts))


def _share(batch: int, process: Process) -> slice:
    size = batch // process.world_size
    return slice(process.rank * size, (process.rank + 1) * size)


def largest(ours: Tensor, recorded: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape; NaN where one has a NaN."""
    return float((ours.detach().float().cpu() - recorded).abs().max())


def max_or_nan(a: float, b: float) -> float:
    """The larger number, or NaN if one is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _relative(ours: float, recorded: float) -> float:
    if ours == recorded:
        return 0.0
    return abs(ours - recorded) / abs(recorded) if recorded else math.inf
