"""How a command of this project fails: one sentence that names what was wrong and the cure, and exit code 2."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence

SHOWN = 8  # of many names, how many a sentence spells out


class UserError(Exception):
    """A mistake that the user can mend. The message is shown as it is, without a traceback."""


def run_command(command: Callable[[], int | None]) -> None:
    """Run ``command`` and leave the process with its exit code; a :class:`UserError` becomes a line and exit code 2."""
    try:
        sys.exit(command() or 0)
    except UserError as error:
        report(error)
        sys.exit(2)


def report(error: object) -> None:
    """Print the line of an error."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def some(names: Iterable[object], shown: int = SHOWN) -> str:
    """The first names of many: ``a, b, c and 12 more``."""
    texts = list(map(str, names))
    return ", ".join(texts[:shown]) + (f" and {len(texts) - shown} more" if len(texts) > shown else "")


def listing(problems: Sequence[str], shown: int | None = None) -> str:
    """All problems or the first ``shown``, each on a line of its own below the sentence that this is appended to."""
    more = len(problems) - len(problems[:shown])
    return "".join(f"\n  - {problem}" for problem in problems[:shown]) + (f"\n  - and {more} more" if more else "")


@functools.cache
def hide_finalizers_of_numba() -> None:
    """Keep numba's harmless KeyError from stderr, which it reports when a compiled pipeline is collected."""
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not (unraisable.exc_type is KeyError and isinstance(unraisable.object, weakref.finalize)):
            report(unraisable)

    sys.unraisablehook = hook
