"""The programs that started this process: without them nobody would end it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence

import psutil

STARTER = "IJEPA_STARTER"  # a process above the launchers that the ranks are not to outlive: run.sh gives its own
_INTERVAL = 0.5  # seconds
_PROGRAMS = {
    *("deepspeed", "deepspeed.pt", "ds", "torchrun", "srun", "slurmstepd", "mpirun", "mpiexec", "mpiexec.hydra"),
    *("orterun", "orted", "prterun", "prte", "prted", "hydra_pmi_proxy", "hydra_bstrap_proxy"),
    *("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"),
}
_above: list[Launchers] = []  # what is watched
_ended: list[str] = []
_noting = threading.Lock()


class Launchers:
    """The chain of launchers above a process: ``deepspeed`` and the one it starts on each node, ``mpirun``, ...

    A shell is none, so ``nohup python run.py &`` outlives it. A launcher that has another program between itself and
    the process, such as a shell script, is not found.

    Args:
        process: the one at the lower end.
        starter: the id of a process that belongs to the chain, whatever it is, if it is above.
    """

    def __init__(self, process: psutil.Process, starter: int | None = None) -> None:
        parents = process.parents()
        names = [program_of(_command(parent)) for parent in parents]
        length = next((i for i, name in enumerate(names) if name not in _PROGRAMS), len(names))
        length = max([length, *(i + 1 for i, parent in enumerate(parents) if parent.pid == starter)])
        self.names = names[:length]
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


def watch_launchers() -> None:
    """From now on this process asks itself to stop, as by SIGTERM, when a launcher above it has ended.

    To be called before what takes seconds: who has ended by then is not missed. Until the run heeds signals, which it
    does before its first step, the process ends at once.
    """
    starter = os.environ.get(STARTER, "")
    try:
        above = Launchers(psutil.Process(), int(starter) if starter.isdecimal() else None)
    except psutil.Error:  # /proc hides the processes of others
        return
    if above.names:
        _above.append(above)
        threading.Thread(target=_watch, args=[above], name="launchers", daemon=True).start()


def ended() -> bool:
    """Whether a launcher that is watched has ended: looked at once more, as another rank may have seen it first."""
    for above in _above:
        if (name := above.gone()) is not None:
            _note(name)
    return bool(_ended)


def _watch(above: Launchers) -> None:
    while (name := above.gone()) is None:
        time.sleep(_INTERVAL)
    _note(name)
    os.kill(os.getpid(), signal.SIGTERM)


def _note(name: str) -> None:
    """Say it, once a process and by one process of a node."""
    with _noting:
        if not _ended and os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, f"{name} has ended: its processes save and leave\n".encode())
        _ended.append(name)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [process.name()]
    except psutil.Error:
        return []


def program_of(command: Sequence[str]) -> str:
    """The program of a command line: the script or module, where it is a Python."""
    program, *rest = [os.path.basename(word) for word in command] or [""]
    if program.startswith("python"):
        program = next((word for word in rest if not word.startswith("-")), program)
    return program.partition(":")[0]  # SLURM's says more of itself
