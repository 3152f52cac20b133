"""Pretraining: the loop, and what happens between its steps.

The state of a run is the trained weights with their moments, the target encoder's average, and one integer, the step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator
from typing import Any

import torch

from ijepa_ds import activity
from ijepa_ds.build import (
    autocast_dtype,
    build_ijepa,
    build_loader,
    build_sampler,
    build_target,
    check_batch,
    check_stages,
    check_target_layers,
    computing_dtype,
    encoder_dimensions,
    input_of_encoder,
    is_compiled,
    is_multiblock,
    layer_costs,
    schedules_of,
    shapes_of,
    working_dtype,
)
from ijepa_ds.config import Config, load_config
from ijepa_ds.data.beton import Dataset, inspect_dataset
from ijepa_ds.data.file_set import files_of
from ijepa_ds.data.pretraining_loader import Batch, PretrainingLoader
from ijepa_ds.distributed import Process, Votes, limit_all_groups, patiently
from ijepa_ds.engine.checkpoint import load_newest
from ijepa_ds.engine.stages import Cut, Stages
from ijepa_ds.engine.trainable import Outcome, ShardedTrainable, Trainable
from ijepa_ds.engine.warm_up import Shapes, compile_and_warm_up, warm_up
from ijepa_ds.engine.zero import Zero, init_distributed
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.online import OnlineProbe
from ijepa_ds.exchange.export import export_timm
from ijepa_ds.hardware import bf16_warning, peak_flops, set_numerics
from ijepa_ds.meeting import join, own_ranks
from ijepa_ds.method.masks import MaskSampler, ReferenceSampler, default_context_tokens
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.run import launchers
from ijepa_ds.run.agreement import agree_on_run
from ijepa_ds.run.folder import RunFolder, first_step_of_cooldown
from ijepa_ds.run.heartbeat import GIVEN_UP, Heartbeat
from ijepa_ds.run.loss_guard import LossGuard
from ijepa_ds.run.losses import LossWindow
from ijepa_ds.run.meter import Meter
from ijepa_ds.run.mirror import Mirror, check_mirror
from ijepa_ds.run.monitor import Monitor
from ijepa_ds.run.observer import Observer
from ijepa_ds.run.saving import Saver
from ijepa_ds.run.stop import StopRequest
from ijepa_ds.stage_balance import split_layers


def main(arguments: list[str] | None = None) -> int:
    """The command line of run.py."""
    parser = argparse.ArgumentParser(prog="deepspeed run.py", description="Pretrain an I-JEPA encoder.")
    parser.add_argument("--config", required=True, help="a file of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="such as ijepa.data.workers=4")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        checked = check_before_building(config)
    except UserError as error:
        join().leave(error)
    with Heartbeat(join(), config.ijepa.run.silence_seconds):
        train(config, *checked)
    return GIVEN_UP if launchers.ended() else 0


def check_before_building(config: Config) -> tuple[Dataset, MaskSampler]:
    """Everything that can be refused before a model is built or a process joins."""
    ranks = own_ranks()
    check_batch(config, Process(ranks.rank, ranks.world_size, torch.device("cpu")))
    if ranks.rank == 0:
        check_mirror(config.ijepa.monitor.mirror)
    data = config.ijepa.data
    dataset = inspect_dataset(data.train)
    if data.validation is not None:
        inspect_dataset(data.validation)
    if dataset.num_samples < config.global_batch:
        raise UserError(
            f"{dataset.path} holds {dataset.num_samples} images, fewer than one global batch; lower train_batch_size = "
            f"{config.global_batch}"
        )
    check_stages(config)
    check_target_layers(config)
    sampler = build_sampler(config)
    folder = RunFolder(config)
    folder.check_writable()
    folder.check_belongs(config, dataset.num_samples)
    return dataset, sampler


def train(config: Config, dataset: Dataset, sampler: MaskSampler) -> None:
    """Pretrain as ``config`` says, going on from the run folder's newest checkpoint."""
    low_precision = working_dtype(config) == torch.bfloat16 or autocast_dtype(config) is not None
    set_numerics(low_precision=low_precision, deterministic=config.ijepa.run.deterministic)
    data = config.ijepa.data
    files = [*dataset.paths, *(files_of(data.validation) if data.validation is not None else [])]
    agree_on_run(config, dataset.num_samples, files)
    process = init_distributed()
    trainable = build_trainable(config, process)
    try_shapes(config, sampler, trainable, process)
    loader = build_loader(config, dataset, sampler, trainable)
    schedules = schedules_of(config, loader.steps_per_epoch)
    with Run(config, process, trainable, loader) as run:
        step = run.resume()
        for batches in loader.from_step(step, run.last_step, process.device):
            now = schedules.at(step)
            outcome = trainable.step(run.watch(batches), now)  # stays on the device
            step += 1
            if run.after_step(step, now, outcome):  # logs, pictures, checkpoints: the only waits for the device
                break
        run.finish(step)


def try_shapes(config: Config, sampler: MaskSampler, trainable: ShardedTrainable, process: Process) -> None:
    """Compile for every shape of micro-batch, or on a GPU at least try the largest, before the first step."""
    if isinstance(sampler, ReferenceSampler):
        return  # its contexts have as many lengths as there are patches
    shapes = Shapes(
        num_images=config.micro_batch,
        image_size=config.ijepa.data.image_size,
        context_tokens=sampler.context_tokens,
        num_targets=sampler.num_targets,
        target_tokens=sampler.target_token_counts(),
        contexts=config.ijepa.objective.contexts,
    )
    if is_compiled(config, process.device):
        compile_and_warm_up(trainable, shapes, process)
    elif process.device.type == "cuda":
        warm_up(trainable, dataclasses.replace(shapes, target_tokens=shapes.target_tokens[:1]), process)


def build_trainable(config: Config, process: Process) -> Zero | Stages:
    """The engine that ``config`` asks for: the one place that knows."""
    optimization, stages = config.ijepa.optimization, config.ijepa.pipeline.stages
    settings: dict[str, Any] = {
        "settings": config.deepspeed,
        "betas": optimization.betas,
        "eps": optimization.eps,
        "to_input": input_of_encoder(config, process.device, working_dtype(config)),
        "autocast": autocast_dtype(config),
    }
    trainable: Zero | Stages
    if stages == 1:
        trainable = Zero(build_ijepa(config), build_target(config), process, **settings)
    else:
        cut = Cut(split_layers(layer_costs(config), stages), same_shapes=is_multiblock(config))
        trainable = Stages(build_ijepa(config), build_target(config), process, cut=cut, **settings)
    trainable.target_encoder.layers = config.ijepa.objective.target_layers
    trainable.batches_at_once = micro_batches_at_once(config, process)
    limit_all_groups()
    return trainable


def micro_batches_at_once(config: Config, process: Process) -> int:
    """Micro-batches of a step that one pass of the target encoder takes, as far as they cost no memory.

    Without a backward pass it holds one block's activations of all N patches, when a micro-batch's backward holds
    those of ``depth`` blocks of K. On a CPU one: there is nothing to gain, and the loader's buffers do not live on.
    """
    if process.device.type != "cuda":
        return 1
    patches = config.grid[0] * config.grid[1]
    kept = config.ijepa.masks.context_tokens or default_context_tokens(config.grid)
    micro_batches = config.global_batch * config.ijepa.pipeline.stages // (config.micro_batch * process.world_size)
    most = max(1, encoder_dimensions(config).depth * kept // patches)
    # Of equal numbers: each has its own compiled code.
    return max(count for count in range(1, min(micro_batches, most) + 1) if micro_batches % count == 0)


class Run:
    """What surrounds the loop: it resumes, watches, logs, saves, stops and finishes."""

    def __init__(self, config: Config, process: Process, trainable: Trainable, loader: PretrainingLoader) -> None:
        self.config, self.process, self.trainable, self.loader = config, process, trainable, loader
        self.total_steps = max(1, round(config.ijepa.optimization.epochs * loader.steps_per_epoch))
        self.last_step = min(self.total_steps, config.ijepa.run.stop_after_steps or self.total_steps)
        self.folder = RunFolder(config)
        self.record = self.folder.prepare(config, loader.dataset.num_samples) if process.is_main else {}
        # Before the log is opened, of which only what comes before this step stays.
        with patiently("reading a checkpoint", process):
            start = self.folder.start(config) if process.is_main else None
            self.loaded = load_newest(self.folder.checkpoints, trainable.state(), process, start)
        first_step = 0 if self.loaded is None else self.loaded.step
        self.monitor = Monitor(
            self.folder.path,
            enabled=process.is_main,
            total_steps=self.last_step,
            images_per_step=config.global_batch,
            start_step=first_step,
            mirror=self._mirror(),
        )
        self.shapes = shapes_of(config)
        peak = peak_flops(process.device, computing_dtype(config))
        self.meter = Meter(images_per_step=config.global_batch, peak_flops=peak)
        self.observer = Observer(
            config.ijepa.monitor,
            process,
            self.monitor,
            OnlineProbe(config, process, say=self.monitor.say),
            grid=config.grid,
            steps_per_epoch=loader.steps_per_epoch,
            warmup_steps=round(config.ijepa.optimization.warmup_epochs * loader.steps_per_epoch),
        )
        self.saver = Saver(
            self.folder.checkpoints,
            config.ijepa.checkpoint,
            process,
            steps_per_epoch=loader.steps_per_epoch,
            say=self.monitor.say,
            saved_step=first_step if self._went_on() else -1,
            keep_step=first_step_of_cooldown(config.ijepa.optimization, loader.steps_per_epoch),
        )
        self.losses, self.votes = LossWindow(process), Votes(process)
        self.guard = LossGuard(config, process, loader.step_slots, self.folder.path, say=self.monitor.say)
        self._batch: Batch | None = None
        self._outcome: Outcome | None = None

    def __enter__(self) -> Run:
        self.stop = StopRequest()
        # Garbage is collected at log lines alone: a pause of one rank is one of all. What is alive now stays so.
        gc.collect()
        gc.freeze()
        gc.disable()
        activity.steps_done(0 if self.loaded is None else self.loaded.step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and self.process.world_size == 1:
            with contextlib.suppress(UserError):  # what ended the run is what is said
                self.saver.finish()
        gc.enable()
        gc.unfreeze()
        self.monitor.close()
        self.stop.restore()

    def resume(self) -> int:
        """Begin with what was loaded, if anything was; returns the step."""
        step = 0
        if self.loaded is not None:
            step = self.loaded.step
            self.trainable.publish()
            if self.loaded.warning is not None:
                self.monitor.say(self.loaded.warning)
        self.monitor.text("config", f"```json\n{json.dumps(self.record, indent=2)}\n```")
        self.monitor.say(self._what_starts(step))
        self._warn_of_slow_bf16()
        return step

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step; the time each takes to arrive is measured, and the last one kept to be shown."""
        for batch in self.meter.watch(batches):
            self._batch = batch
            self.meter.computes(self._flops_of(batch))
            yield batch

    def after_step(self, step: int, now: Hyperparameters, outcome: Outcome) -> bool:
        """Log, draw, evaluate and save what is due after ``step`` steps; true where the run must end here."""
        assert self._batch is not None  # a step has micro-batches
        activity.steps_done(step)
        self.meter.step_done()
        self.losses.add(step, outcome)
        self._outcome, last = outcome, step == self.last_step
        if step % self.config.ijepa.monitor.log_steps == 0 or last:
            self._log(step, now, outcome, self._batch)
        with self.meter.pause():
            self.observer.after_step(step, self._batch, self.trainable.features, last=last)
            asked = [self.stop.requested is not None, self.saver.due_by_time(), self.saver.busy]
            stop, late, busy = self.votes.ask(asked)
            self.saver.hear(busy, delay=self.votes.delay)
            if (stop or late or self.saver.due_by_steps(step)) and not last:
                self._save(step, wait=stop)
        if stop and not last:
            signal = self.stop.requested or "another rank"
            self.monitor.say(f"stopped by {signal} after step {step}; the same command goes on")
        return stop

    def finish(self, step: int) -> None:
        """The last checkpoint, and the exported target encoder where the run is complete."""
        with patiently("saving a checkpoint", self.process):
            self.saver.finish()
        if step != self.saver.tried_step:
            self._save(step, wait=True)
        newest = self.folder.newest_checkpoint() if self.process.is_main else None
        if step >= self.total_steps:
            with patiently("exporting the target encoder", self.process):
                if newest is not None:
                    path = export_timm(newest, self.config, self.folder.export)
                    self.monitor.say(f"the target encoder, for timm: {path}")
        if step >= self.last_step:
            self.monitor.say(
                f"done: {step} steps, in {self.folder.path}; "
                f"look at it with: tensorboard --logdir {self.folder.path.parent}"
            )

    def _went_on(self) -> bool:
        """Whether it began with a checkpoint of its own, not with another run's or none."""
        return self.loaded is not None and self.loaded.checkpoint.parent == self.folder.checkpoints

    def _mirror(self) -> Mirror | None:
        name = self.config.ijepa.monitor.mirror
        return Mirror(name, self.folder.path, self.record) if name is not None and self.process.is_main else None

    def _save(self, step: int, *, wait: bool) -> None:
        with patiently("saving a checkpoint", self.process):
            self.saver.save(step, self.trainable.state(), self._outcome, wait=wait)

    def _log(self, step: int, now: Hyperparameters, outcome: Outcome, batch: Batch) -> None:
        gc.collect()
        losses = self.losses.read()
        values = {
            "epoch": step / self.loader.steps_per_epoch,
            "loss": losses.mean,
            **dataclasses.asdict(now),
            **self.meter.read(),
            "context_tokens": float(batch.context_block.shape[1]),
            "target_tokens": float(batch.target_blocks.shape[2]),
        }
        if outcome.gradient_norm is not None:
            values["grad_norm"] = float(outcome.gradient_norm)
        if losses.skipped:
            values["skipped_steps"] = float(losses.skipped)
        if self.process.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(self.process.device) / 1e9
        self.monitor.scalars(step, values)
        self.guard.look(step, losses, values, self.saver, lambda: self.trainable.examine(batch))

    def _flops_of(self, batch: Batch) -> float:
        """Operations of a micro-batch."""
        num_targets, _, target_tokens = batch.target_blocks.shape
        contexts, context_tokens = batch.context_block.shape
        flops = self.shapes.flops(
            context_tokens=context_tokens,
            target_tokens=target_tokens,
            num_targets=num_targets,
            contexts=contexts // len(batch.images),
        )
        return len(batch.images) * flops.total

    def _warn_of_slow_bf16(self) -> None:
        dtypes = {"bf16": working_dtype(self.config), "torch_autocast": autocast_dtype(self.config)}
        key = next((key for key, dtype in dtypes.items() if dtype == torch.bfloat16), None)
        if key is not None and self.process.is_main:
            cure = f"for a new run, --set {key}.enabled=false"
            if warning := bf16_warning(True, self.process.device, cure=cure):
                self.monitor.say(warning)

    def _what_starts(self, step: int) -> str:
        config, loader = self.config, self.loader
        millions = {name: count / 1e6 for name, count in self.trainable.num_parameters.items()}
        beginning = "starting at step 0" if self.loaded is None else f"going on from step {step}"
        if self.loaded is not None and not self._went_on():
            beginning += f" of {self.loaded.checkpoint}"
        return (
            f"{config.ijepa.run.name}: encoder {millions['context_encoder']:.1f} M, predictor "
            f"{millions['predictor']:.1f} M parameters; {loader.dataset.num_samples} images, "
            f"{loader.steps_per_epoch} steps an epoch, {self.total_steps} in all\n"
            f"batch {config.global_batch} = {self.trainable.data_ranks} processes x {loader.micro_batch} images x "
            f"{loader.micro_batches_per_step} micro-batches; {self.trainable.describe()}, "
            f"{self.process.device.type} with {self.meter.peak_flops / 1e12:.3g} TFLOP/s in a product; "
            f"{loader.pipeline.num_workers} loading threads a process\n"
            f"masks: {config.ijepa.masks.sampler} on {config.grid[0]} x {config.grid[1]} patches; folder "
            f"{self.folder.path}; {beginning}"
        )
