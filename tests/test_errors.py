"""How mistakes are listed, and which reports of numba stay out of sight."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest

from ijepa_ds.errors import hide_finalizers_of_numba, listing, some


def test_many_names_are_cut() -> None:
    assert some("abc") == "a, b, c" and some(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert listing(["a", "b"]) == "\n  - a\n  - b" and listing([]) == "" and listing([], 2) == ""
    assert listing(["a", "b", "c", "d"], 2) == "\n  - a\n  - b\n  - and 2 more"


class Thing:
    """Something that can be collected."""


def test_only_a_key_error_of_a_finalizer_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    hide_finalizers_of_numba.cache_clear()
    hide_finalizers_of_numba()
    for error in (KeyError, ValueError):

        def fail(error: type[Exception] = error) -> None:
            raise error

        thing = Thing()
        weakref.finalize(thing, fail)
        del thing
    assert [report.exc_type for report in reported] == [ValueError]
    hide_finalizers_of_numba.cache_clear()
