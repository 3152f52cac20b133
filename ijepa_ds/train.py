"""Pretraining: the loop, and what happens between its steps.

The state of a run is the engine's master weights and moments, the target encoder's average, and one integer, the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time

import torch

from ijepa_ds.build import (
    autocast_dtype,
    build_ijepa,
    build_loader,
    build_sampler,
    build_target,
    check_batch,
    encoder_dimensions,
    schedules_of,
    working_dtype,
)
from ijepa_ds.config import Config, load_config
from ijepa_ds.data.beton import Dataset, inspect_dataset
from ijepa_ds.data.pretraining_loader import Batch, PretrainingLoader
from ijepa_ds.distributed import Process, from_main, leave_to_main_process, mean_over_ranks, on_any_rank
from ijepa_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from ijepa_ds.engine.target_encoder import TargetEncoder
from ijepa_ds.engine.zero import adam_state, build_engine, gradient_norm, init_distributed
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.online import OnlineProbe
from ijepa_ds.exchange.export import export_timm
from ijepa_ds.method.ijepa import normalize_images
from ijepa_ds.method.masks import MaskSampler
from ijepa_ds.method.optimizer import set_hyperparameters
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.run.folder import RunFolder
from ijepa_ds.run.health import health
from ijepa_ds.run.meter import Meter
from ijepa_ds.run.monitor import Monitor
from ijepa_ds.run.pictures import draw_masks, feature_sheet
from ijepa_ds.run.stop import StopRequest

_PICTURE_IMAGES = 8
_HEALTH_IMAGES = 256


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
    except UserError:
        leave_to_main_process()
        raise
    train(config, *checked)
    return 0


def train(config: Config, dataset: Dataset, sampler: MaskSampler) -> None:
    """Pretrain as ``config`` says, going on from the run folder's newest checkpoint."""
    process = init_distributed()
    check_batch(config, process)
    model = build_ijepa(config).to(process.device)
    engine, shards = build_engine(model, config)
    target_encoder = TargetEncoder(build_target(config), shards, autocast=autocast_dtype(config))
    loader = build_loader(config, dataset, sampler, process)
    schedules = schedules_of(config, loader.steps_per_epoch)
    run = Run(config, process, engine, shards, target_encoder, loader)
    step = run.resume()
    for batches in loader.from_step(step, run.last_step, process.device):
        now = schedules.at(step)
        set_hyperparameters(engine.optimizer, now)
        for batch in run.meter.watch(batches):
            images = run.to_input(batch.images)
            targets = target_encoder(images, batch.target_blocks)
            loss = engine(images, batch.context_block, batch.target_blocks, targets)
            engine.backward(loss)
            engine.step()
            run.add(loss, batch)  # stays on the device
        if engine.was_step_applied():  # a step with a gradient that is not finite is skipped by DeepSpeed
            target_encoder.update(now.momentum)
        step += 1
        if run.after_step(step, now):  # logs, pictures, checkpoints: the only waits for the device
            break
    run.finish(step)


class Run:
    """What surrounds the loop: folder, monitor, checkpoints, stopping."""

    def __init__(self, config, process, engine, shards, target_encoder: TargetEncoder, loader: PretrainingLoader):
        self.config, self.process, self.engine, self.shards = config, process, engine, shards
        self.target_encoder, self.loader = target_encoder, loader
        self.folder = RunFolder(config)
        self.total_steps = max(1, round(config.ijepa.optimization.epochs * loader.steps_per_epoch))
        self.last_step = min(self.total_steps, config.ijepa.run.stop_after_steps or self.total_steps)
        self.meter = Meter(images_per_step=config.global_batch)
        self.probe = OnlineProbe(config, process, say=lambda line: self.monitor.say(line))
        self.stop = StopRequest()
        data, dtype = config.ijepa.data, working_dtype(config)
        self._normalization = {"mean": _row(data.mean, process), "std": _row(data.std, process), "dtype": dtype}
        # Sum and number of the finite losses since the last log line, on the device; the steps that were skipped.
        self._losses, self._skipped = torch.zeros(2, device=process.device), 0
        self._last_loss: torch.Tensor | None = None
        self._batch: Batch | None = None
        self._saved_step, self._saved_time = -1, time.monotonic()

    def to_input(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> the encoders' input [B, 3, H, W]."""
        return normalize_images(images, **self._normalization)

    def resume(self) -> int:
        """Open the run folder; returns the step to begin with, 0 or that of the newest checkpoint."""
        if self.process.is_main:
            record = self.folder.prepare(self.config, self.loader.dataset.num_samples)
        # Rank 0 decides: on a shared file system others may see it late.
        checkpoint = from_main(self.folder.newest_checkpoint() if self.process.is_main else None, self.process)
        step = 0
        if checkpoint is not None:
            step = load_checkpoint(checkpoint, self.shards, self.target_encoder, self._adam)
            self._saved_step = step
        self.monitor = Monitor(
            self.folder.path,
            enabled=self.process.is_main,
            total_steps=self.last_step,
            images_per_step=self.config.global_batch,
            start_step=step,
        )
        if self.process.is_main:
            self.monitor.text("config", f"```json\n{json.dumps(record, indent=2)}\n```")
            self._say_what_starts(step)
        return step

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Note a micro-batch's loss without waiting for the device."""
        self._last_loss = loss.detach().float()
        finite = torch.isfinite(self._last_loss)
        self._losses += torch.stack([torch.where(finite, self._last_loss, 0.0), finite.float()])
        self._batch = batch

    def after_step(self, step: int, now: Hyperparameters) -> bool:
        """Log, draw, evaluate and save what is due after ``step`` steps; true where the run must end here."""
        self.meter.step_done()
        self._skipped += not self.engine.was_step_applied()
        monitor, last = self.config.ijepa.monitor, step == self.last_step
        if step % monitor.log_steps == 0 or last:
            self._log(step, now)
        with self.meter.pause():
            if _due(step, monitor.health_steps, last):
                self._log_health(step)
            if _due(step, monitor.picture_steps, last) or (monitor.picture_steps and step == 1):
                self._draw(step)
            if self.probe.due(step, self.loader.steps_per_epoch, last):
                accuracy = self.probe.accuracy(lambda images: self.target_encoder.features(self.to_input(images)))
                self.monitor.scalars(step, accuracy)
            stop, save = on_any_rank([self.stop.requested is not None, self._checkpoint_due(step)], self.process)
            if (save or stop) and not last:
                self._save(step)
        if stop and not last:
            self.monitor.say(
                f"stopped by {self.stop.requested or 'another rank'} after step {step}; the same command goes on"
            )
        return stop

    def finish(self, step: int) -> None:
        """The last checkpoint, and the exported target encoder where the run is complete."""
        if step != self._saved_step:
            self._save(step)
        if step >= self.total_steps and self.process.is_main:
            path = export_timm(self.folder.newest_checkpoint(), self.config, self.folder.export)
            self.monitor.say(f"the target encoder, for timm: {path}")
        if step >= self.last_step:
            self.monitor.say(
                f"done: {step} steps, in {self.folder.path}; "
                f"look at it with: tensorboard --logdir {self.folder.path.parent}"
            )
        self.monitor.close()
        self.stop.restore()

    def _log(self, step: int, now: Hyperparameters) -> None:
        total, finite = self._losses
        loss = mean_over_ranks(total / finite, self.process)  # 0/0 where none was finite
        self._losses.zero_()
        if not math.isfinite(loss):
            raise UserError(
                f"no loss since the last log line was finite at step {step}; the checkpoints up to step "
                f"{max(0, self._saved_step)} are good: lower ijepa.optimization.lr_peak, or look for broken images "
                "with data_prep/to_ffcv.py --verify"
            )
        values = {
            "epoch": step / self.loader.steps_per_epoch,
            "loss": loss,
            **dataclasses.asdict(now),
            **self.meter.read(),
            "context_tokens": float(self._batch.context_block.shape[1]),
            "target_tokens": float(self._batch.target_blocks.shape[2]),
        }
        norm = gradient_norm(self.engine)
        if norm is not None:
            values["grad_norm"] = norm
        if self._skipped:
            values["skipped_steps"] = float(self._skipped)
        if self.process.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(self.process.device) / 1e9
        self.monitor.scalars(step, values)

    def _log_health(self, step: int) -> None:
        if self.process.is_main:
            features = self.target_encoder.features(self.to_input(self._batch.images[:_HEALTH_IMAGES]))
            self.monitor.scalars(step, health(features))

    def _draw(self, step: int) -> None:
        if not self.process.is_main:
            return
        batch, few = self._batch, _PICTURE_IMAGES
        images = batch.images[:few].cpu().numpy()
        blocks = batch.context_block[:few].cpu().numpy(), batch.target_blocks[:, :few].cpu().numpy()
        self.monitor.picture(step, "masks", draw_masks(images, *blocks, grid=self.config.grid))
        features = self.target_encoder.features(self.to_input(batch.images[:few]))
        self.monitor.picture(step, "features", feature_sheet(images, features.float().cpu(), grid=self.config.grid))

    def _checkpoint_due(self, step: int) -> bool:
        settings = self.config.ijepa.checkpoint
        by_time = settings.minutes > 0 and time.monotonic() - self._saved_time > 60 * settings.minutes
        return by_time or _due(step, settings.steps, False)

    def _save(self, step: int) -> None:
        began = time.monotonic()
        if on_any_rank([not self._weights_are_finite()], self.process)[0]:
            self.monitor.say(
                f"step {step} is not saved: its loss or gradient is not finite; what was saved before stays"
            )
            return
        keep = self.config.ijepa.checkpoint.keep
        path = save_checkpoint(
            self.folder.checkpoints, step, self.shards, self.target_encoder, self._adam, self.process, keep=keep
        )
        self._saved_step, self._saved_time = step, time.monotonic()
        self.monitor.say(f"saved {path} in {time.monotonic() - began:.1f} s")

    def _weights_are_finite(self) -> bool:
        if self._last_loss is None or not self.engine.was_step_applied():
            return True  # unchanged since the step before
        norm = gradient_norm(self.engine)  # DeepSpeed's -1 stands for a norm that is not finite
        return math.isfinite(self._last_loss) and (norm is None or 0 <= norm < math.inf)

    def _adam(self, shard):
        return adam_state(self.engine, shard)

    def _say_what_starts(self, step: int) -> None:
        config, loader = self.config, self.loader
        parameters = {
            name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in self.engine.module.named_children()
        }
        self.monitor.say(
            f"{config.ijepa.run.name}: encoder {parameters['context_encoder']:.1f} M, predictor "
            f"{parameters['predictor']:.1f} M parameters; {loader.dataset.num_samples} images, "
            f"{loader.steps_per_epoch} steps an epoch, {self.total_steps} in all\n"
            f"batch {config.global_batch} = {self.process.world_size} processes x {config.micro_batch} images x "
            f"{loader.micro_batches_per_step} micro-batches; ZeRO {config.zero_stage}, {working_dtype(config)}, "
            f"{self.process.device.type}; {loader.pipeline.num_workers} loading threads a process\n"
            f"masks: {config.ijepa.masks.sampler} on {config.grid[0]} x {config.grid[1]} patches; folder "
            f"{self.folder.path}; " + (f"going on from step {step}" if self._saved_step >= 0 else "starting at step 0")
        )


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


def _row(values: tuple[float, ...], process: Process) -> torch.Tensor:
    return torch.tensor(values, device=process.device)


def check_before_building(config: Config) -> tuple[Dataset, MaskSampler]:
    """Everything that can be refused before a model is built or a process joins."""
    data = config.ijepa.data
    dataset = inspect_dataset(data.train)
    if data.validation is not None:
        inspect_dataset(data.validation)
    if dataset.num_samples < config.global_batch:
        raise UserError(
            f"{data.train} holds {dataset.num_samples} images, fewer than one global batch; lower train_batch_size = "
            f"{config.global_batch}"
        )
    encoder_dimensions(config)
    sampler = build_sampler(config)
    folder = RunFolder(config)
    folder.check_writable()
    folder.check_belongs(config, dataset.num_samples)
    return dataset, sampler
