"""Learning rate, weight decay and EMA momentum as pure functions of the step, as the reference code has them.

Step 0 is the first optimizer step. The reference advances its lr and weight decay schedulers before it uses them, so
these two count from 1, the momentum from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def warmup_cosine(step: int, *, warmup_steps: int, horizon: int, start: float, peak: float, final: float) -> float:
    """A linear way from ``start`` to ``peak``, then a cosine to ``final`` at ``horizon``, where it stays."""
    if step < warmup_steps:
        return start + step / warmup_steps * (peak - start)
    progress = min(1.0, (step - warmup_steps) / max(1, horizon - warmup_steps))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def warmup_constant_cooldown(
    step: int, *, warmup_steps: int, cooldown_steps: int, horizon: int, start: float, peak: float, final: float
) -> float:
    """A linear way from ``start`` to ``peak``, then ``peak``, and in the last steps a line to ``final`` at ``horizon``.

    Where it ends changes nothing before its last ``cooldown_steps`` (V-JEPA 2, Assran et al., arXiv 2506.09985).
    """
    if step < warmup_steps:
        return start + step / warmup_steps * (peak - start)
    left = max(0, horizon - step)
    return peak if left >= cooldown_steps else final + left / cooldown_steps * (peak - final)


@dataclass(frozen=True)
class Hyperparameters:
    """What changes with the step."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class Schedules:
    """The three schedules of a run.

    ``horizon`` is the schedules' length in steps. Longer than the run (``schedule_scale`` > 1), the run ends before the
    lr has reached ``lr_final``; beyond the horizon every value stays at its end. With ``cooldown_steps``, None for the
    cosine, all three keep one value after the warm-up until the last of so many steps, in which they go to their end.
    """

    warmup_steps: int
    horizon: int
    lr_start: float
    lr_peak: float
    lr_final: float
    weight_decay: tuple[float, float]
    momentum: tuple[float, float]
    cooldown_steps: int | None = None

    def at(self, step: int) -> Hyperparameters:
        """The values to use in ``step``, counted from 0."""
        if self.cooldown_steps is not None:
            return Hyperparameters(
                self._constant(step + 1, self.warmup_steps, self.lr_start, self.lr_peak, self.lr_final),
                self._constant(step + 1, 0, 0.0, *self.weight_decay),
                self._constant(step + 1, 0, 0.0, *self.momentum),
            )
        lr = warmup_cosine(
            step + 1,
            warmup_steps=self.warmup_steps,
            horizon=self.horizon,
            start=self.lr_start,
            peak=self.lr_peak,
            final=self.lr_final,
        )
        return Hyperparameters(lr, self._weight_decay(step + 1), self._momentum(step))

    def _constant(self, step: int, warmup_steps: int, start: float, peak: float, final: float) -> float:
        assert self.cooldown_steps is not None
        return warmup_constant_cooldown(
            step,
            warmup_steps=warmup_steps,
            cooldown_steps=self.cooldown_steps,
            horizon=self.horizon,
            start=start,
            peak=peak,
            final=final,
        )

    def _weight_decay(self, step: int) -> float:
        start, final = self.weight_decay
        # Cosine as in the reference code; the paper's appendix A.1 says linear.
        return final + (start - final) * (1 + math.cos(math.pi * min(1.0, step / self.horizon))) / 2

    def _momentum(self, step: int) -> float:
        start, final = self.momentum
        return start + min(1.0, step / self.horizon) * (final - start)


def build_schedules(
    *,
    steps_per_epoch: int,
    epochs: float,
    warmup_epochs: float,
    schedule_scale: float,
    lr_start: float,
    lr_peak: float,
    lr_final: float,
    weight_decay: tuple[float, float],
    momentum: tuple[float, float],
) -> Schedules:
    """Schedules in steps from a recipe in epochs; ``schedule_scale`` is the reference's ``ipe_scale``."""
    return Schedules(
        warmup_steps=int(warmup_epochs * steps_per_epoch),
        horizon=max(1, int(schedule_scale * epochs * steps_per_epoch)),  # a run has a step at least
        lr_start=lr_start,
        lr_peak=lr_peak,
        lr_final=lr_final,
        weight_decay=weight_decay,
        momentum=momentum,
    )
