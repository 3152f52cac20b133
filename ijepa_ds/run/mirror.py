"""TensorBoard's scalars once more, for Weights & Biases or MLflow, where ``ijepa.monitor.mirror`` asks for it.

The libraries talk to servers, so a thread of its own does, and training never waits for it: what fails is one warning,
and the mirror stays behind from there.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ijepa_ds.errors import UserError
from ijepa_ds.files import replacing

WAITING = 1000  # log lines that a slow server may be behind
SECONDS_TO_CLOSE = 30.0
PROJECT = "ijepa_ds"  # wandb's, where WANDB_PROJECT names no other; MLflow's experiment is what its variables say

Send = Callable[[int, dict[str, float]], object]


def check_mirror(name: str | None) -> None:
    """Refuse a mirror whose package is missing; rank 0 asks before anything is built."""
    if name is None:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"ijepa.monitor.mirror = {name} needs the package {name} ({error}); pip install {name}, or leave it out"
        ) from None


class Mirror:
    """A run at one of the services; a resumed run goes on in the same one, whose id is kept in ``folder``.

    Args:
        name: "wandb" or "mlflow".
        folder: of the run, whose name the mirrored run gets.
        record: the run's configuration and versions.
    """

    def __init__(self, name: str, folder: Path, record: dict[str, Any]) -> None:
        self.name, self.folder, self.record = name, folder, record
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._gone = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Hand on the values of ``step`` by TensorBoard's tags; one that is not finite is left out. Never waits."""
        if self._gone:
            return
        try:
            self._lines.put_nowait((step, {tag: value for tag, value in values.items() if math.isfinite(value)}))
        except queue.Full:
            self._give_up(f"{WAITING} log lines wait to be sent")

    def close(self) -> None:
        """Send what is left, for at most :data:`SECONDS_TO_CLOSE`."""
        if self._gone:
            return
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return self._give_up(f"{WAITING} log lines wait to be sent")
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._give_up(f"its last lines took more than {SECONDS_TO_CLOSE:g} s")
        self._gone = True

    def _work(self) -> None:
        try:
            send, end = {"wandb": self._open_wandb, "mlflow": self._open_mlflow}[self.name]()
            while (line := self._lines.get()) is not None and not self._gone:
                send(*line)
            end()
        except BaseException as error:  # also a library's SystemExit: nothing of it may reach the run
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _give_up(self, why: str) -> None:
        if not self._gone:
            self._gone = True
            warning = f"warning: {self.name} hears no more of this run ({why}); training goes on"
            print(warning, file=sys.stderr, flush=True)

    def _open_wandb(self) -> tuple[Send, Callable[[], object]]:
        wandb = importlib.import_module("wandb")
        run_id = self._known_id() or uuid.uuid4().hex[:8]
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.folder.name,
            id=run_id,
            resume="allow",
            dir=str(self.folder),
            config=self.record,
        )
        self._keep_id(run_id)
        # Steps of its own, as wandb's must grow: a resumed run may repeat some that were logged after its checkpoint.
        run.define_metric("*", step_metric="step")
        return lambda step, values: run.log({"step": step, **values}), run.finish

    def _open_mlflow(self) -> tuple[Send, Callable[[], object]]:
        mlflow = importlib.import_module("mlflow")
        known = self._known_id()
        run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=self.folder.name)
        if not known:
            self._keep_id(run.info.run_id)
            mlflow.log_dict(self.record, "config.json")
        return lambda step, values: mlflow.log_metrics(values, step=step), mlflow.end_run

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}_run.txt"

    def _known_id(self) -> str:
        return self._file.read_text().strip() if self._file.is_file() else ""

    def _keep_id(self, run_id: str) -> None:
        with replacing(self._file) as temporary:
            temporary.write_text(f"{run_id}\n")
