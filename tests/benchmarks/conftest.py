"""The scripts of benchmarks/ find one another because Python looks beside the script that it runs; so here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
