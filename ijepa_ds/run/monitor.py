"""What a run says about itself: TensorBoard, ``metrics.jsonl``, a console line per logging step, and its clock.

Nothing here touches the device: values arrive as Python floats, read where the training loop logs anyway.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_ds.activity import doing
from ijepa_ds.errors import UserError
from ijepa_ds.progress import duration
from ijepa_ds.run.metrics_file import MetricsFile
from ijepa_ds.run.mirror import Mirror

# The values every run logs: name -> (TensorBoard tag, console text). The console keeps this order.
KNOWN_SCALARS: dict[str, tuple[str, str]] = {
    "epoch": ("schedule/epoch", "epoch {:.2f}"),
    "loss": ("train/loss", "loss {:.4f}"),
    "lr": ("schedule/lr", "lr {:.1e}"),
    "weight_decay": ("schedule/weight_decay", "wd {:.3f}"),
    "momentum": ("schedule/momentum", "ema {:.5f}"),
    "grad_norm": ("train/grad_norm", "|g| {:.2f}"),
    "images_per_second": ("speed/images_per_second", "{:.0f} img/s"),
    "tflops": ("speed/tflops", "{:.3g} TFLOP/s"),
    "peak_share": ("speed/peak_share", "{:.0%} of peak"),
    "loader_wait": ("speed/loader_wait", "wait {:.0%}"),
    "memory_gb": ("speed/memory_gb", "{:.1f} GB"),
    # Not on the console: the rate in images says the same.
    "step_seconds": ("speed/step_seconds", ""),
    "processor_seconds": ("speed/processor_seconds", ""),
    # ijepa_ds.run.health
    "rankme": ("health/rankme", "rankme {:.1f}"),
    "lidar": ("health/lidar", "lidar {:.1f}"),
    "feature_std": ("health/feature_std", "feature std {:.4f}"),
    "mean_cosine": ("health/mean_cosine", "cosine {:.3f}"),
    "token_variance": ("health/token_variance", "token variance {:.3g}"),
}
INTERVALS_KEPT = 20  # logging intervals behind "left": long enough for a steady median, short enough to follow a change


class Monitor:
    """The log of one run, written by rank 0 alone; on every other rank (``enabled=False``) each method does nothing.

    A disk that fails or fills up does not stop the training: one warning, and what can still be written goes on.

    Args:
        folder: takes TensorBoard's event files, ``metrics.jsonl`` and ``pictures/``.
        enabled: true on rank 0.
        total_steps: optimizer steps of the whole run.
        images_per_step: the global batch, for an image rate where :class:`Meter` gave none.
        start_step: the step a resumed run goes on from; what an earlier process logged beyond it is taken back.
        clock: seconds, for tests.
        mirror: hears the scalars, too.

    Raises:
        UserError: the folder cannot be made or written at the start.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        enabled: bool,
        total_steps: int,
        images_per_step: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.enabled = enabled
        self.total_steps = total_steps
        self.images_per_step = images_per_step
        self._start_step = start_step
        self._clock = clock
        self._last_step: int | None = None
        self._last_time = 0.0
        self._step_seconds: deque[float] = deque(maxlen=INTERVALS_KEPT)
        self._warned = False
        self._mirror = mirror
        if not enabled:
            return
        _hide_full_disks_of_tensorboard()
        # Imported here because it takes seconds that only rank 0 should spend.
        from torch.utils.tensorboard import SummaryWriter

        try:
            (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
            self._metrics = MetricsFile(self.folder / "metrics.jsonl", last_step=start_step)
            # TensorBoard drops the events of an earlier process from purge_step on.
            self._writer: SummaryWriter | None = SummaryWriter(
                str(self.folder), purge_step=start_step + 1, flush_secs=30
            )
        except OSError as error:
            raise UserError(f"cannot write the run's log in {self.folder}: {error.strerror or error}") from error

    def scalars(self, step: int, values: dict[str, float], *, console: bool = True) -> None:
        """Log ``values`` of ``step`` (optimizer steps done); several calls for one step are one line of the file.

        Names of :data:`KNOWN_SCALARS` get their tag and console text; any other goes under ``train/``, unless it brings
        its own group (``"knn/top1"``). In ``metrics.jsonl`` a value that is not finite is null.
        """
        if not self.enabled:
            return
        self._note_time(step)
        self._save(lambda: self._metrics.write(step, values))
        for name, value in values.items():
            self._to_tensorboard("add_scalar", scalar_tag(name), value, step)
        if self._mirror is not None:
            self._mirror.scalars(step, {scalar_tag(name): value for name, value in values.items()})
        if console:
            self.say(self._console_line(step, values))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Log ``image`` (uint8 [H, W, 3]) to TensorBoard and as ``pictures/NAME_STEP.png``."""
        if not self.enabled:
            return
        from PIL import Image

        path = self.folder / "pictures" / f"{name.replace('/', '-')}_{step:08d}.png"
        self._save(lambda: Image.fromarray(image).save(path))
        self._to_tensorboard("add_image", f"pictures/{name}", image, step, dataformats="HWC")

    def text(self, name: str, markdown: str) -> None:
        """Show ``markdown`` on TensorBoard's text page."""
        if self.enabled:
            self._to_tensorboard("add_text", name, markdown, self._start_step)

    def say(self, line: str) -> None:
        """Print ``line`` on rank 0."""
        if self.enabled:
            self._guard(lambda: print(line, flush=True))

    def close(self) -> None:
        """Write what is still queued for TensorBoard. May be called twice."""
        if self.enabled and self._writer is not None:
            writer, self._writer = self._writer, None
            self._save(writer.close)
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            mirror.close()

    def seconds_left(self, step: int) -> float | None:
        """Estimate at the recent rate; None while there is no interval to go by.

        The median of the last logging intervals, so that neither the first one (compilation) nor a checkpoint counts.
        """
        if not self._step_seconds:
            return None
        return statistics.median(self._step_seconds) * max(0, self.total_steps - step)

    def _note_time(self, step: int) -> None:
        now = self._clock()
        if self._last_step is None:
            self._last_step, self._last_time = step, now  # the first interval, from the start to here, is not kept
        elif step > self._last_step:
            self._step_seconds.append((now - self._last_time) / (step - self._last_step))
            self._last_step, self._last_time = step, now

    def _console_line(self, step: int, values: dict[str, float]) -> str:
        known = [text.format(values[name]) for name, (_, text) in KNOWN_SCALARS.items() if name in values and text]
        other = [f"{name} {value:.4g}" for name, value in values.items() if name not in KNOWN_SCALARS]
        if "loss" in values and "images_per_second" not in values and self._step_seconds:
            known.append(f"{self.images_per_step / max(statistics.median(self._step_seconds), 1e-9):.0f} img/s")
        parts = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", *known, *other]
        left = self.seconds_left(step)
        if left is not None:
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)

    def _to_tensorboard(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call ``method`` of the SummaryWriter, which is given up at its first failed write.

        Its own thread does the writing, dies of that error and raises it again at every later call.
        """
        if self._writer is not None and not self._save(lambda: getattr(self._writer, method)(*args, **kwargs)):
            self._writer = None

    def _save(self, write: Callable[[], object]) -> bool:
        """Run ``write``, which needs the folder's disk: not the console, which may be held up by who reads it."""
        with doing(f"writing its log to {self.folder}", own=True):
            return self._guard(write)

    def _guard(self, write: Callable[[], object]) -> bool:
        """Run ``write``; false where the disk refused it, which is said once."""
        try:
            write()
            return True
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or error
                with contextlib.suppress(OSError):
                    warning = f"warning: the run's log in {self.folder} has gaps from here ({reason}); training goes on"
                    print(warning, file=sys.stderr, flush=True)
            return False


@functools.cache
def _hide_full_disks_of_tensorboard() -> None:
    """Keep the traceback of TensorBoard's writing thread from stderr: the next call raises what it met, once."""
    report = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        if not (isinstance(died.exc_value, OSError) and type(died.thread).__name__ == "_AsyncWriterThread"):
            report(died)

    threading.excepthook = hook


def scalar_tag(name: str) -> str:
    """TensorBoard's tag of a value: its group comes first (``loss`` -> ``train/loss``)."""
    if name in KNOWN_SCALARS:
        return KNOWN_SCALARS[name][0]
    return name if "/" in name else f"train/{name}"
