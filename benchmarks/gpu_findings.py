"""What a section of the first GPU hour is given, and where it keeps what it finds: on disk at once, for a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch

VERDICTS = {True: "ok", False: "NO", None: ""}


class OutOfTime(Exception):
    """Too little is left of a section's share."""


@dataclass(frozen=True)
class Finding:
    """A line of the table; ``holds`` is None where a figure is neither right nor wrong."""

    section: str
    what: str
    value: Any
    expected: str = ""
    holds: bool | None = None

    def row(self) -> list[Any]:
        """Its cells."""
        return [self.section, self.what, self.value, self.expected, VERDICTS[self.holds]]


HEADER = ["section", "what", "value", "expected", "holds"]


@dataclass
class Context:
    """One section's surroundings. ``images``: a .beton file, if one was given."""

    section: str
    device: torch.device
    folder: Path
    seconds: float
    tiny: bool = False
    images: Path | None = None
    findings: list[Finding] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def file(self) -> Path:
        """Where the findings are kept."""
        return self.folder / f"{self.section}.json"

    def left(self) -> float:
        """Seconds of the section's share."""
        return self.seconds - (time.monotonic() - self.began)

    def found(self, what: str, value: Any, expected: str = "", holds: bool | None = None) -> None:
        """Keep a finding, on disk from now on."""
        self.findings.append(Finding(self.section, what, value, expected, holds))
        measure.save([asdict(finding) for finding in self.findings], self.file)
        print(" | ".join(map(str, self.findings[-1].row())), flush=True)

    def attempt(self, what: str, measurement: Callable[[], object], *, needs: float = 0.0) -> None:
        """Make a measurement; keep its error as a finding and go on; with less than ``needs`` seconds left, skip it."""
        try:
            if self.left() < needs:
                raise OutOfTime(f"{self.left():.0f} s are left, {needs:.0f} s are needed")
            measurement()
        except OutOfTime as error:
            self.found(what, f"not made: {error}")
        except Exception as error:
            traceback.print_exc()
            self.found(what, _short(error), holds=False)

    def size(self, full: Any, tiny: Any) -> Any:
        """A number that the rehearsal has smaller."""
        return tiny if self.tiny else full

    def dataset(self) -> Path:
        """The .beton file to read: the given one, or rendered scenes that are made once."""
        if self.images is not None:
            return self.images
        beton = self.folder / "scenes.beton"
        if not beton.exists():
            scenes, size = self.folder / "scenes", self.size(256, 32)
            made = ["--size", size, "--train", self.size(1024, 64), "--val", 1]
            _run([sys.executable, "data_prep/make_scenes.py", scenes, *made])
            _run([sys.executable, "data_prep/to_ffcv.py", scenes, beton, "--split", "train"])
        return beton


def load_findings(file: Path) -> list[Finding]:
    """What a section has kept, however it ended."""
    return [Finding(**finding) for finding in json.loads(file.read_text())] if file.exists() else []


def _run(command: list[Any]) -> None:
    done = subprocess.run([*map(str, command)], cwd=measure.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-500:]}")


def _short(error: Exception) -> str:
    """One line of an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
