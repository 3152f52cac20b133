"""The losses between two log lines, kept where they were computed, and what they say when they are read together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ijepa_ds.distributed import Process, gather
from ijepa_ds.engine.trainable import Outcome


@dataclass(frozen=True)
class StepLoss:
    """What became of one step, over all processes."""

    step: int  # optimizer steps done, this one included
    mean: float  # of its finite losses; NaN where there is none
    applied: bool  # false: a gradient was not finite, nothing moved
    not_finite: list[tuple[int, int]] = field(default_factory=list)  # (micro-batch, rank) of the losses that are not

    @property
    def is_finite(self) -> bool:
        """Whether its gradient was, and each of its losses."""
        return self.applied and not self.not_finite


@dataclass(frozen=True)
class Losses:
    """What was read at a log line: the steps since the one before, alike on all processes."""

    steps: list[StepLoss]
    mean: float  # of all finite losses; NaN where there is none
    in_a_row: int  # steps up to the last one of which none was finite, also before these
    skipped: int  # steps of this process's life that moved nothing


class LossWindow:
    """The outcomes since the last log line, unread: a step waits for no device."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._outcomes: list[tuple[int, Outcome]] = []
        self._in_a_row = self._skipped = 0

    def add(self, step: int, outcome: Outcome) -> None:
        """Note what the step did after which there were ``step``; nothing is read."""
        self._outcomes.append((step, outcome))

    def read(self) -> Losses:
        """All that was added since the last call. Waits for the device, and for all processes."""
        numbers = [step for step, _ in self._outcomes]
        losses = torch.stack([outcome.losses for _, outcome in self._outcomes]).detach().float().cpu()  # [S, k]
        applied = torch.stack([outcome.applied for _, outcome in self._outcomes]).bool().tolist()
        self._outcomes = []
        finite = losses.isfinite()
        # By step: the sum of the finite ones, their number, and that of the others.
        sums = torch.stack([losses.where(finite, 0.0).sum(1), finite.sum(1), (~finite).sum(1)])
        if self.process.world_size > 1:
            dist.all_reduce(sums, group=self.process.control)
        places: dict[int, list[tuple[int, int]]] = {}
        if sums[2].any():
            for rank, found in enumerate(gather((~finite).nonzero().tolist(), self.process)):
                for index, micro_batch in found:
                    places.setdefault(index, []).append((micro_batch, rank))
        means = (sums[0] / sums[1]).tolist()
        steps = [StepLoss(*each, places.get(i, [])) for i, each in enumerate(zip(numbers, means, applied, strict=True))]
        for step in steps:
            self._in_a_row = 0 if step.is_finite else self._in_a_row + 1
        self._skipped += applied.count(False)
        return Losses(steps, float(sums[0].sum() / sums[1].sum()), self._in_a_row, self._skipped)
