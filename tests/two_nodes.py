"""Two nodes on one machine: network namespaces with a cable between them, names, addresses and folders of their own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed_runs import FOLDER, TrainingRun, _start, _train, _wait, run_folder, train_beton, write_config

_NEW_MOUNTS, _NEW_NAME, _NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclass(frozen=True)
class Node:
    """One of them; ``hidden``: paths that have something else in their place there -> that, or None for nothing."""

    name: str
    namespace: str
    address: str
    hidden: tuple[tuple[str, str | None], ...] = ()

    def enter(self) -> None:
        """Put the calling process, which has one thread, onto this node."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as namespace:
            _check(libc.setns(namespace.fileno(), _NEW_NETWORK))
        _check(libc.unshare(_NEW_MOUNTS | _NEW_NAME))
        socket.sethostname(self.name)
        _check(libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
        for path, instead in self.hidden:
            if instead is None:
                _check(libc.mount(b"none", path.encode(), b"tmpfs", 0, None))
            else:
                _check(libc.mount(instead.encode(), path.encode(), None, _BIND, None))


@contextlib.contextmanager
def two_nodes(**hidden_on_b: str | None) -> Iterator[tuple[Node, Node]]:
    """Nodes ``alpha`` and ``beta``. Skips the test where namespaces may not be made."""
    tag = f"{os.getpid() % 100000}{time.monotonic_ns() % 1000}"
    a, b = f"ija{tag}", f"ijb{tag}"
    made: list[str] = []
    try:
        for command in (
            *(f"ip netns add {name}" for name in (a, b)),
            f"ip link add {a} netns {a} type veth peer name {b} netns {b}",
            *(
                f"ip -n {name} {what}"
                for name, address in ((a, "10.213.7.1"), (b, "10.213.7.2"))
                for what in (f"addr add {address}/24 dev {name}", f"link set {name} up", "link set lo up")
            ),
        ):
            try:
                done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
            except FileNotFoundError:
                pytest.skip("no ip command (iproute2) to make network namespaces with")
            if done.returncode:
                pytest.skip(f"network namespaces may not be made here: {done.stderr.strip() or command}")
            if " netns add " in command:
                made.append(command.split()[-1])
        yield Node("alpha", a, "10.213.7.1"), Node("beta", b, "10.213.7.2", tuple(hidden_on_b.items()))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def train_on(
    nodes: tuple[Node, Node],
    config: dict[str, Any],
    *,
    ranks_a_node: int = 1,
    prepare: Callable[[], None] | None = None,
    timeout: float = 600.0,
    **environment: str,
) -> tuple[TrainingRun, list[str], float]:
    """Train with as many ranks on each: (the run, what each rank printed, seconds from start to end of all)."""
    out = FOLDER / f"nodes_{time.monotonic_ns()}"
    out.mkdir()
    train_beton()
    path, world_size = write_config(config), 2 * ranks_a_node
    processes, began = [], time.monotonic()
    for rank in range(world_size):
        given = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % ranks_a_node),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(ranks_a_node),
            "MASTER_ADDR": nodes[0].address,
            "MASTER_PORT": "29511",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        arguments = (nodes[rank // ranks_a_node], str(path), prepare)
        processes.append(_start(_train_on, arguments, given, out / str(rank)))
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes) and time.monotonic() < end:
        time.sleep(0.05)  # nobody ends the others: as where each node has a launcher of its own
    seconds = time.monotonic() - began
    _wait(processes, 0.0)
    outputs = [Path(out / str(rank)).read_text() for rank in range(world_size)]
    codes = [process.exitcode for process in processes]
    return TrainingRun(codes, "".join(outputs), run_folder(config)), outputs, seconds


def _train_on(node: Node, path: str, prepare: Callable[[], None] | None) -> None:
    try:
        node.enter()
    except OSError as error:
        print(f"cannot enter: {error}", flush=True)
        os._exit(77)
    _train(path, prepare)
