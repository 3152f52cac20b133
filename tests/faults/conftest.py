"""Attacks, counted; see :mod:`fault_rows`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fault_rows import Row


@pytest.fixture
def row() -> Callable[[str], Row]:
    """Make the row of an experiment by its name."""
    return Row
