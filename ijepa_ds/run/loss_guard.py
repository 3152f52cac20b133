"""Steps whose loss stands out or is not finite: what is said, written down, and when a run ends for it."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ijepa_ds.config import Config
from ijepa_ds.distributed import Process, from_main, gather
from ijepa_ds.engine.trainable import Examination
from ijepa_ds.errors import UserError
from ijepa_ds.run.losses import Losses, StepLoss
from ijepa_ds.run.saving import Saver

SPIKE_WINDOW = 200  # losses of steps that a new one is compared with
SPIKE_LEAST = 50  # of them, before any comparison
_MOST_STEPS = 3  # of a warning
_MOST_SAMPLES = 8  # of a step


class LossGuard:
    """Looks at the losses of each log line; all processes call it together.

    Args:
        samples: of the step with this index from 0, as numbers in the dataset, int64 [micro-batches, ranks, images].
        folder: of the run.
        say: speaks on rank 0.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        samples: Callable[[int], np.ndarray],
        folder: Path,
        *,
        say: Callable[[str], object],
    ) -> None:
        self.process, self.samples, self.folder, self.say = process, samples, folder, say
        self.limit = config.ijepa.run.nonfinite_steps
        self.spikes = Spikes(config.ijepa.monitor.spike_deviations)
        self.pipeline = config.ijepa.pipeline.stages > 1  # with one loss for all samples of a step

    def look(
        self, step: int, losses: Losses, values: dict[str, float], saver: Saver, examine: Callable[[], Examination]
    ) -> None:
        """Warn of what is unusual after ``step`` steps, of which the log says ``values``.

        Args:
            examine: looks at the micro-batch at hand, if the run has to end.

        Raises:
            UserError: on all processes, after too many steps in a row that were not finite; it names the newest of
                the checkpoints of ``saver`` and the file in which all is written that is known.
        """
        if spike := self.spikes.look(losses.steps):
            self.say(f"warning: {spike}")
        bad = [each for each in losses.steps if not each.is_finite]
        if bad:
            told = "; step ".join(in_words(each, self._places(each)) for each in bad[:_MOST_STEPS])
            more = f"; and {len(bad) - _MOST_STEPS} more" if len(bad) > _MOST_STEPS else ""
            self.say(f"warning: not finite: step {told}{more}")
        if 0 < self.limit <= losses.in_a_row:
            self._end(step, losses, values, saver, examine)

    def _places(self, loss: StepLoss) -> list[dict[str, Any]]:
        """Where a step's losses were not finite: ``rank``, ``micro_batch`` and ``samples``, numbers in the dataset."""
        if self.pipeline or not loss.not_finite:
            return []
        slots = self.samples(loss.step - 1)
        return [
            {"rank": rank, "micro_batch": micro_batch, "samples": slots[micro_batch, rank].tolist()}
            for micro_batch, rank in loss.not_finite
        ]

    def _end(
        self, step: int, losses: Losses, values: dict[str, float], saver: Saver, examine: Callable[[], Examination]
    ) -> NoReturn:
        saver.finish()
        examinations = gather(dataclasses.asdict(examine()), self.process)
        written = ""
        if self.process.is_main:
            what = {
                "values": values,
                "steps": [{**dataclasses.asdict(each), "not_finite": self._places(each)} for each in losses.steps],
                "samples_of_last_step": self.samples(step - 1).ravel().tolist(),
                "last_micro_batch_by_rank": examinations,
            }
            written = _write(self.folder / f"not_finite_step_{step:09d}.json", what)
        raise UserError(
            f"{losses.in_a_row} steps in a row were not finite, up to step {step}; lower ijepa.optimization.lr_peak, "
            f"or look for broken images with data_prep/to_ffcv.py --verify; {from_main(written, self.process)}; "
            f"{saver.newest()}"
        )


def in_words(loss: StepLoss, places: list[dict[str, Any]]) -> str:
    """A step that was not finite: ``places`` as in the file, empty where they are not known."""
    moved = "applied all the same" if loss.applied else "nothing moved"
    if not loss.not_finite:
        return f"{loss.step} (its gradient; {moved})"
    if not places:
        return f"{loss.step} (its loss; {moved})"
    samples = sorted({sample for place in places for sample in place["samples"]})
    shown = ", ".join(map(str, samples[:_MOST_SAMPLES]))
    more = f" and {len(samples) - _MOST_SAMPLES} more" if len(samples) > _MOST_SAMPLES else ""
    ranks = ", ".join(map(str, sorted({place["rank"] for place in places})))
    return f"{loss.step} (the loss of samples {shown}{more}, on rank {ranks}; {moved})"


class Spikes:
    """Finds losses that stand out of those before them.

    Args:
        deviations: how many standard deviations a step's mean loss is above the mean of the last
            :data:`SPIKE_WINDOW` to be told of; 0 turns it off.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self._before: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def look(self, steps: list[StepLoss]) -> str | None:
        """The highest of ``steps`` that stand out, in words; they count as known from then on."""
        highest, told = self.deviations, None
        for step in steps:
            if not math.isfinite(step.mean):
                continue
            if len(self._before) >= SPIKE_LEAST and self.deviations:
                mean, deviation = statistics.fmean(self._before), statistics.pstdev(self._before)
                height = (step.mean - mean) / deviation if deviation else 0.0
                if height > highest:
                    highest = height
                    told = (
                        f"the loss of step {step.step} is {step.mean:.4f}, {height:.1f} deviations above the mean "
                        f"{mean:.4f} of the {len(self._before)} before it"
                    )
            self._before.append(step.mean)
        return told


def _write(path: Path, what: dict[str, Any]) -> str:
    """Write what is known as JSON, in which numbers that are not finite are "nan", "inf" and "-inf"; says where."""
    try:
        path.write_text(json.dumps(_plain(what), indent=1) + "\n")
    except OSError as error:
        return f"what is known of them could not be written ({error.strerror or error})"
    return f"their samples, losses and norms by layer are in {path}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
