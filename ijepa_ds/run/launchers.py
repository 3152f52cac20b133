"""Whether the programs that started this process are still there: without them nobody would end it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import psutil

STARTER = "IJEPA_STARTER"  # a process above the launchers that the ranks are not to outlive: run.sh gives its own
_PROGRAMS = {
    *("deepspeed", "deepspeed.pt", "ds", "torchrun", "srun", "slurmstepd", "mpirun", "mpiexec", "mpiexec.hydra"),
    *("orterun", "orted", "prterun", "prte", "prted", "hydra_pmi_proxy", "hydra_bstrap_proxy"),
}
_MODULES = {
    *("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"),
}
_FIRST_WORDS = 5  # of a command line, that may name the program: ``python -u -m MODULE``


class Launchers:
    """The chain of launchers above this process: ``deepspeed`` and the one it starts on each node, ``mpirun``, ...

    A shell is none, so ``nohup python run.py &`` outlives it. A launcher that has another program between itself and
    the process, such as a shell script, is not found.

    Args:
        process: the one at its lower end.
        starter: the id of a process that belongs to it, whatever it is, if it is above.
    """

    def __init__(self, process: psutil.Process, starter: int | None = None) -> None:
        parents = process.parents()
        length = next((i for i, parent in enumerate(parents) if not is_launcher(_command(parent))), len(parents))
        length = max([length, *(i + 1 for i, parent in enumerate(parents) if parent.pid == starter)])
        self.names = [_name(_command(parent)) for parent in parents[:length]]
        self._links = list(zip([process, *parents], parents[:length], strict=False))

    def gone(self) -> str | None:
        """The name of one that has ended, if any has: its children have another parent then."""
        for (child, parent), name in zip(self._links, self.names, strict=True):
            try:
                if child.ppid() != parent.pid:
                    return name
            except psutil.Error:
                return name
        return None


@functools.cache
def launchers() -> Launchers:
    """Of this process. To be called first before what takes seconds: who has ended by then would not be missed."""
    starter = os.environ.get(STARTER, "")
    try:
        return Launchers(psutil.Process(), int(starter) if starter.isdecimal() else None)
    except psutil.Error:  # /proc hides the processes of others
        return _NONE


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is one of those that start ranks."""
    return any(os.path.basename(word) in _PROGRAMS or word in _MODULES for word in command[:_FIRST_WORDS])


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [process.name()]
    except psutil.Error:
        return []


def _name(command: Sequence[str]) -> str:
    words = [os.path.basename(word) for word in command[:_FIRST_WORDS]]
    return next((word for word in words if word in _PROGRAMS or word in _MODULES), words[-1] if words else "")


class _NoLaunchers(Launchers):
    def __init__(self) -> None:
        self.names, self._links = [], []


_NONE = _NoLaunchers()
