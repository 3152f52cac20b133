"""``metrics.jsonl``: what a run has logged, a line a step."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from pydantic import ConfigDict

from ijepa_ds.files import replacing
from ijepa_ds.validation import Checked, NotJSON, check, parse_json


class _Line(Checked):
    """A line, as far as it matters here."""

    model_config = ConfigDict(extra="ignore")

    step: int


class MetricsFile:
    """``metrics.jsonl``: one JSON object per step, ``{"step": ..., "time": unix seconds, name: value or null, ...}``.

    Opening it takes back the lines of steps beyond ``last_step`` and a line that a killed process left unfinished; the
    file is replaced as a whole, so that being killed there loses nothing.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path = path
        self._record: dict[str, float | int | None] = {}
        kept = _lines_up_to(path, last_step) if path.is_file() else []
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self._offset = self._end = sum(map(len, kept))  # of the last line; past it

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line, or extend the last one where it is of the same step.

        Lines are written at a known offset, so what a failed write left behind is overwritten by the next.
        """
        if self._record.get("step") != step:
            self._record, self._offset = {"step": step, "time": round(time.time(), 3)}, self._end
        self._record.update({name: float(value) if math.isfinite(value) else None for name, value in values.items()})
        line = json.dumps(self._record, allow_nan=False).encode() + b"\n"
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            # Somebody may have emptied or removed the file meanwhile.
            self._offset = min(self._offset, os.fstat(file.fileno()).st_size)
            file.seek(self._offset)
            file.write(line)
            file.truncate()
        self._end = self._offset + len(line)


def _lines_up_to(path: Path, last_step: int) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            said, _ = check(_Line, parse_json(line))
        except NotJSON:
            continue  # cut off in the middle
        if line.endswith(b"\n") and said is not None and said.step <= last_step:
            kept.append(line)
    return kept
