"""What happened to what was attacked, counted.

``pytest -n 0 -s -m long tests/faults`` is the long form; with FAULTS_JSON=FILE each experiment adds its row to FILE.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

BAD = ("lost", "silent", "hung", "traceback")
GOOD = ("survived", "refused")  # went on as if nothing had happened; said what is wrong in a sentence


@dataclasses.dataclass
class Row:
    """The outcomes of one experiment; ``examples``: the first of each bad outcome, to look into."""

    experiment: str
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys((*GOOD, *BAD), 0))
    figures: dict[str, float] = dataclasses.field(default_factory=dict)  # such as the longest time, with its unit
    examples: list[str] = dataclasses.field(default_factory=list)

    @property
    def tried(self) -> int:
        """All that were counted."""
        return sum(self.counts.values())

    def count(self, outcome: str, what: str = "") -> None:
        """Note one outcome; ``what``: how to make it again, for a bad one."""
        self.counts[outcome] += 1
        if outcome in BAD and len(self.examples) < 20:
            self.examples.append(f"{outcome}: {what}")

    def hold(self, tried: int) -> None:
        """Fail unless this many were tried and none of them was bad."""
        self.record()
        print(f"\n{self.experiment}: {self.tried} tried, {self.counts} {self.figures or ''}", flush=True)
        assert self.tried == tried
        assert not any(self.counts[outcome] for outcome in BAD), "\n".join(self.examples)

    def record(self) -> None:
        """Write the row as it is, where one is asked for."""
        if not (name := os.environ.get("FAULTS_JSON")):
            return
        path = Path(name)
        rows = json.loads(path.read_text()) if path.exists() else {}
        rows[self.experiment] = {"tried": self.tried, **self.counts, **self.figures, "examples": self.examples}
        path.write_text(json.dumps(rows, indent=1) + "\n")
