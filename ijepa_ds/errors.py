"""How a command of this project fails: one sentence that names what was wrong and the cure, and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend. The message is shown as it is, without a traceback."""


def run_command(command: Callable[[], int | None]) -> None:
    """Run ``command`` and leave the process with its exit code; a :class:`UserError` becomes a line and exit code 2."""
    try:
        sys.exit(command() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
