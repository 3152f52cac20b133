"""What a run shows of itself now and then: health, pictures, a probe of its features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ijepa_ds.distributed import Process, patiently
from ijepa_ds.engine.trainable import Batch
from ijepa_ds.run.collapse import CollapseWatch
from ijepa_ds.run.health import health
from ijepa_ds.run.monitor import Monitor
from ijepa_ds.run.pictures import draw_masks, feature_sheet
from ijepa_ds.settings import MonitorConfig

PICTURE_IMAGES = 8
HEALTH_IMAGES = 256

Features = Callable[[Tensor], Tensor]  # uint8 images [B, H, W, 3] on the device -> [B, N, D]


class Probe(Protocol):
    """Measures what the features know."""

    def due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        """Whether a measurement is due after ``step`` steps."""

    def accuracy(self, features: Features) -> dict[str, float]:
        """Values by name, on the main rank; all processes call this together."""


class Observer:
    """Looks at the target encoder's features where ``settings`` say so, and gives what it sees to ``monitor``."""

    def __init__(
        self,
        settings: MonitorConfig,
        process: Process,
        monitor: Monitor,
        probe: Probe,
        *,
        grid: tuple[int, int],
        steps_per_epoch: int,
        warmup_steps: int,
    ) -> None:
        self.settings, self.process, self.monitor, self.probe = settings, process, monitor, probe
        self.grid, self.steps_per_epoch = grid, steps_per_epoch
        self.collapse = CollapseWatch(trained_from=warmup_steps)

    def after_step(self, step: int, batch: Batch, features: Features, *, last: bool) -> None:
        """Show what is due after ``step`` steps, of the last micro-batch; all processes call this together."""
        healthy = is_due(step, self.settings.health_steps, last)
        drawn = is_due(step, self.settings.picture_steps, last) or (self.settings.picture_steps > 0 and step == 1)
        probed = self.probe.due(step, self.steps_per_epoch, last)
        if not (healthy or drawn or probed):
            return
        with patiently("looking at its features", self.process):  # rank 0, for the most part
            if self.process.is_main and healthy:
                self._examine(step, batch, features)
            if self.process.is_main and drawn:
                self._draw(step, batch, features)
            if probed:
                self.monitor.scalars(step, self.probe.accuracy(features))

    def _examine(self, step: int, batch: Batch, features: Features) -> None:
        images = batch.images[:HEALTH_IMAGES]
        signals = health(features(images), batch.context_block)
        self.monitor.scalars(step, signals)
        if warning := self.collapse.look(step, signals, num_images=len(images)):
            self.monitor.say(warning)

    def _draw(self, step: int, batch: Batch, features: Features) -> None:
        images = batch.images[:PICTURE_IMAGES]
        pixels = images.cpu().numpy()
        context_block = batch.context_block[:PICTURE_IMAGES].cpu().numpy()
        target_blocks = batch.target_blocks[:, :PICTURE_IMAGES].cpu().numpy()
        self.monitor.picture(step, "masks", draw_masks(pixels, context_block, target_blocks, grid=self.grid))
        tokens = features(images).float().cpu()
        self.monitor.picture(step, "features", feature_sheet(pixels, tokens, grid=self.grid))


def is_due(step: int, every: int, last: bool) -> bool:
    """Every so many steps and after the last one; 0 is never."""
    return every > 0 and (step % every == 0 or last)
