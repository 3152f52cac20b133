"""Who this process is among all of a run, read from the environment of whatever started it.

``deepspeed`` and ``torchrun`` set RANK. ``srun`` and ``mpirun`` have names of their own, and without them each of their
tasks would take itself for the only one. Nothing here talks to another process.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from ijepa_ds.errors import UserError

_PORTS = range(10000, 30000)  # below those that systems hand out by themselves
_DEFAULT_PORT = 29500  # torch's and DeepSpeed's
_SPECIAL_STEP = 0xFFFFFFF0  # SLURM numbers its batch scripts and interactive shells from here on: nobody's tasks
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
_LOCAL_RANKS = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",  # MPICH and Intel MPI
    "PMI_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
)
_LOCAL_SIZES = (
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "PMI_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
)
_MPI = {  # names of the rank and of the number of ranks: of Open MPI, MVAPICH, MPICH and its kin
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
}
RANK_NAMES = ("RANK", *_MPI, "SLURM_PROCID", "PMIX_RANK")


@dataclass(frozen=True)
class Ranks:
    """This process among all that were started: ``local_rank`` of ``local_size`` on its node, ``rank`` of all."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master: str  # where rank 0 is
    port: int

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world_size == 1

    def as_environment(self) -> dict[str, str]:
        """The variables of torch's and DeepSpeed's launchers, which libraries read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }


ALONE = Ranks(0, 1, 0, 1, "127.0.0.1", _DEFAULT_PORT)


# How long processes wait for each other, at the start and in a step.
PATIENCE = {"IJEPA_START_SECONDS": "seconds", "DEEPSPEED_TIMEOUT": "minutes"}


def find_ranks(environment: Mapping[str, str]) -> Ranks:
    """Who a process of this environment is: the innermost launcher counts.

    ``mpirun`` starts its daemons by ``srun`` where there is one, and both start ``deepspeed`` on each node.

    Raises:
        UserError: several were started, but not all is known that they need to find each other, or a variable that
            says how long they wait says nothing.
    """
    for name, unit in PATIENCE.items():
        if not (told := environment.get(name, "1")).isdecimal() or int(told) == 0:
            raise UserError(f"{name} = '{told}' must be a whole number of {unit} above 0; set another, or unset it")
    if "RANK" in environment:
        return _ranks(environment, "RANK", "WORLD_SIZE")
    for rank, world_size in _MPI.items():
        if rank in environment:
            return _ranks(environment, rank, world_size)
    if _is_task_of_srun(environment):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        return _ranks(environment, "SLURM_PROCID", size)
    if "PMIX_RANK" in environment and "SLURM_JOB_ID" not in environment:
        raise UserError(
            "PMIX_RANK is set, but how many processes there are is not; start them with mpirun, srun, torchrun or "
            "deepspeed, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return ALONE


def _ranks(environment: Mapping[str, str], rank_name: str, size_name: str) -> Ranks:
    rank, world_size = _number(environment, rank_name), _number(environment, size_name)
    if not 0 <= rank < world_size:
        raise UserError(f"{rank_name} = {rank} is none of the ranks of {size_name} = {world_size}")
    if world_size == 1:
        return ALONE
    local_size = _local_size(environment)
    return Ranks(
        rank,
        world_size,
        _local_rank(environment, rank_name),
        local_size,
        _master(environment, rank_name, one_node=_on_one_node(environment, rank_name, world_size)),
        _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else job_port(environment),
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    if name not in environment:
        present = next(given for given in RANK_NAMES if given in environment)
        raise UserError(f"{present} is set, but {name} is not: set both, or neither for a run of one process")
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name} = {environment[name]!r} is not a number; it is the launcher's to set") from None


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process, not the script or shell of an allocation that has tasks to give."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if step.isdigit():
        return int(step) < _SPECIAL_STEP and "SLURM_PROCID" in environment
    return environment.get("SLURM_PROCID", "0") != "0"


def _local_rank(environment: Mapping[str, str], rank_name: str) -> int:
    for name in _LOCAL_RANKS:
        if name in environment:
            return _number(environment, name)
    if rank_name == "RANK":
        return 0  # one process a node, as in pods of Kubernetes
    raise UserError(f"{rank_name} is set, but no rank on the node: set LOCAL_RANK, or start with torchrun or deepspeed")


def _local_size(environment: Mapping[str, str]) -> int:
    """How many processes share this one's cores."""
    for name in _LOCAL_SIZES:
        if name in environment:
            return _number(environment, name)
    if "RANK" in environment or environment.get("SLURM_CPU_BIND_TYPE", "").startswith(("mask", "map", "rank")):
        return 1  # srun has given it cores of its own
    counts = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[min(node, len(counts) - 1)]


def _on_one_node(environment: Mapping[str, str], rank_name: str, world_size: int) -> bool:
    if rank_name == "SLURM_PROCID":
        return environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1"
    return any(environment.get(name) == str(world_size) for name in _LOCAL_SIZES)


def _master(environment: Mapping[str, str], rank_name: str, *, one_node: bool) -> str:
    if master := environment.get("MASTER_ADDR"):
        return master
    if one_node:
        return "127.0.0.1"
    # Only srun's tasks are those of its step: mpirun has its daemons on the other nodes started as one.
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")[rank_name != "SLURM_PROCID" :]
    nodes = next((environment[name] for name in names if environment.get(name)), "")
    if nodes and rank_name != "RANK":
        return first_host(nodes)
    example = "mpirun -x MASTER_ADDR=HOST ..." if rank_name.startswith("OMPI") else "MASTER_ADDR=HOST"
    raise UserError(
        f"{rank_name} = {environment[rank_name]} of several on several nodes, but nothing says where rank 0 is; name "
        f"its node: {example}"
    )


def job_port(environment: Mapping[str, str]) -> int:
    """A port that all processes of a job compute alike, and two jobs on a node hardly ever."""
    job = next((environment[name] for name in _JOBS if environment.get(name)), None)
    if job is None:
        return _DEFAULT_PORT
    step = environment.get("SLURM_STEP_ID", "")
    return _PORTS[zlib.crc32(f"{job}.{step}".encode()) % len(_PORTS)]


def first_host(nodes: str) -> str:
    """The first of a list in SLURM's short form: ``gpu[07-09,12],login`` begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "")


def expand_counts(counts: str) -> list[int]:
    """Tasks of each node in SLURM's short form: ``8(x2),4`` is 8, 8, 4."""
    expanded: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        expanded += [int(count)] * int(times.rstrip(")") or 1)
    return expanded


def device_index(ranks: Ranks, num_devices: int) -> int:
    """Which of the visible GPUs is this process's: its own where it sees one alone (``--gpus-per-task=1``).

    Raises:
        UserError: more processes on this node than GPUs.
    """
    if num_devices == 1:
        return 0
    if ranks.local_rank >= num_devices:
        raise UserError(
            f"process {ranks.local_rank + 1} of this node sees {num_devices} GPUs: start as many processes a node as "
            "it has GPUs"
        )
    return ranks.local_rank


def route_to(host: str, port: int) -> tuple[str, str]:
    """(own address, address of ``host``) of the route from here to there; nothing is sent.

    Raises:
        OSError: the name is unknown, or there is no route.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as datagram:
        datagram.connect(address)
        return datagram.getsockname()[0], str(address[0])


def interface_of(address: str) -> str | None:
    """The network interface that has this address here, if one has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None
