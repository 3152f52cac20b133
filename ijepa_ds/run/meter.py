"""Wall time of the training loop between two readings, and what was computed in it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Meter:
    """Wall time of the training loop between two readings: images/s, seconds a step, share of waiting for the loader.

    It never waits for the device. Kernels run behind the host, so the numbers are right over a window that ends where
    the loop reads its loss, not for a single step. The first step (compilation) and paused time are left out.

    ``peak_flops``: operations a second that the device reaches in a plain product of matrices. ``clock`` gives seconds,
    ``processor_clock`` those that all threads of this process have had a core: what a step costs on a CPU that others
    use, too.

    ::

        meter = Meter(images_per_step=2048)
        for batches in meter.watch(loader):
            ...
            meter.step_done()
            if logging:
                values |= meter.read()
    """

    def __init__(
        self,
        *,
        images_per_step: int,
        peak_flops: float = math.nan,
        clock: Callable[[], float] = time.perf_counter,
        processor_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.images_per_step, self.peak_flops = images_per_step, peak_flops
        self._clock, self._processor_clock = clock, processor_clock
        self._warm = False
        self._since, self._worked_since = clock(), processor_clock()
        self._steps, self._waited, self._flops = 0, 0.0, 0.0

    def watch(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The items of ``batches``; the time that each takes to arrive counts as waiting.

        It would count twice where ``batches`` is watched too.
        """
        iterator = iter(batches)
        while True:
            began = self._clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += self._clock() - began
            yield item

    def computes(self, flops: float) -> None:
        """Note that the step under way takes so many more operations of this process's device."""
        self._flops += flops

    def step_done(self) -> None:
        """One optimizer step is done."""
        if self._warm:
            self._steps += 1
        else:
            self._warm = True
            self._restart()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time spent inside (a checkpoint, an evaluation)."""
        began, worked, waited = self._clock(), self._processor_clock(), self._waited
        try:
            yield
        finally:
            self._since += self._clock() - began
            self._worked_since += self._processor_clock() - worked
            self._waited = waited

    def read(self) -> dict[str, float]:
        """What :class:`Meter` says since the last reading; {} where no step was done.

        ``images_per_second`` of all processes, ``step_seconds``, ``processor_seconds`` of this process for a step,
        ``loader_wait`` (0 to 1); and, where it was told what is computed, ``tflops`` (10^12 operations a second of this
        process's device) and ``peak_share`` (0 to 1).
        """
        seconds, worked = self._clock() - self._since, self._processor_clock() - self._worked_since
        steps, waited, flops = self._steps, self._waited, self._flops
        if steps == 0 or seconds <= 0:
            return {}
        self._restart()
        values = {
            "images_per_second": self.images_per_step * steps / seconds,
            "step_seconds": seconds / steps,
            "processor_seconds": worked / steps,
            "loader_wait": min(1.0, waited / seconds),
        }
        if flops:
            values |= {"tflops": flops / seconds / 1e12, "peak_share": flops / seconds / self.peak_flops}
        return values

    def _restart(self) -> None:
        self._since, self._worked_since = self._clock(), self._processor_clock()
        self._steps, self._waited, self._flops = 0, 0.0, 0.0
