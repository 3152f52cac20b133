"""From what one task found for each encoder to a result: none without its baselines."""

from __future__ import annotations
