"""The losses between two log lines, summed where they were computed."""

from __future__ import annotations

import torch

from ijepa_ds.distributed import Process, mean_over_ranks
from ijepa_ds.engine.trainable import Outcome


class LossSum:
    """The finite losses since the last log line; and how many steps were skipped in all."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._sum = torch.zeros(2, device=process.device)  # of the finite losses, and their number
        self._skipped = torch.zeros((), device=process.device)

    def add(self, outcome: Outcome) -> None:
        """Note a step's losses; they stay on the device."""
        finite = outcome.losses.isfinite()
        self._sum += torch.stack([torch.where(finite, outcome.losses, 0.0).sum(), finite.sum()])
        self._skipped += ~outcome.applied

    @property
    def skipped_steps(self) -> int:
        """How many steps moved nothing. Waits for the device."""
        return int(self._skipped)

    def mean(self) -> float:
        """The mean over all ranks, NaN where no loss was finite; the sum starts anew. Waits for the device."""
        total, number = self._sum
        mean = mean_over_ranks(total / number, self.process)
        self._sum.zero_()
        return mean
