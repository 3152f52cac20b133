"""A run whose number of processes changes while it lasts, with stages among them, against one that never changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from distributed_runs import run_training, tiny_config
from fault_rows import Row

BATCH = 12
PHASES = [(1, 1, 2), (2, 1, 4), (1, 1, 5), (3, 1, 7), (2, 2, 9), (1, 1, 10)]  # processes, stages, the step it ends at


@pytest.mark.long
def test_the_losses_are_those_of_one_process_throughout(row: Callable[[str], Row]) -> None:
    sizes = row("world sizes 1, 2, 1, 3, 2 stages, 1 in one run")
    alone = run_training(tiny_config(train_batch_size=BATCH, ijepa__run__name="alone"), 1)
    assert alone.exit_codes == [0] and len(alone.losses) == 10
    largest = 0.0
    for processes, stages, end in PHASES:
        config = tiny_config(
            train_batch_size=BATCH,
            train_micro_batch_size_per_gpu=BATCH * stages // processes // 2 if processes < 3 else 4,
            zero_optimization={"stage": 2 if stages == 1 else 1},
            ijepa__run__name="changing",
            ijepa__run__stop_after_steps=end,
            ijepa__pipeline={"stages": stages, "largest_bubble": 1.0},
        )
        run = run_training(config, processes)
        ended = run.exit_codes == [0] * processes and len(run.losses) == end
        apart = max((abs(a / b - 1) for a, b in zip(run.losses, alone.losses, strict=False)), default=1.0)
        largest = max(largest, apart)
        sizes.count("survived" if ended and apart < 1e-6 else "lost", f"{processes} x {stages}: {apart} {run.output}")
    sizes.figures["largest relative difference of a loss"] = largest
    sizes.hold(len(PHASES))
