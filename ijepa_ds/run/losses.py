"""The losses between two log lines, summed where they were computed."""

from __future__ import annotations

import torch

from ijepa_ds.distributed import Process, mean_over_ranks
from ijepa_ds.engine.trainable import Outcome


class LossSum:
    """The finite losses since the last log line; and how many steps were skipped in all."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.skipped_steps = 0
        self._sum = torch.zeros(2, device=process.device)  # of the finite losses, and their number

    def add(self, outcome: Outcome) -> None:
        """Note a step's losses; they stay on the device."""
        self.skipped_steps += not bool(outcome.applied)
        for loss in outcome.losses:
            finite = torch.isfinite(loss)
            self._sum += torch.stack([torch.where(finite, loss, 0.0), finite.float()])

    def mean(self) -> float:
        """The mean over all ranks, NaN where no loss was finite; the sum starts anew. Waits for the device."""
        total, number = self._sum
        mean = mean_over_ranks(total / number, self.process)
        self._sum.zero_()
        return mean
