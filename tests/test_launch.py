"""Ranks from the environments of launchers, and what is refused."""

from __future__ import annotations

import pytest

from ijepa_ds.errors import UserError
from ijepa_ds.launch import ALONE, Ranks, device_index, expand_counts, find_ranks, first_host, interface_of, route_to

DEEPSPEED = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}
DEEPSPEED |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
TORCHRUN = {name: value for name, value in DEEPSPEED.items() if name != "LOCAL_SIZE"} | {"LOCAL_WORLD_SIZE": "8"}
ALLOCATION = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NNODES": "2"}
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "MASTER_ADDR": "node1",
}
MVAPICH = {name.replace("OMPI_", "MV2_"): value for name, value in OPEN_MPI.items()}
MPICH = {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8", "MASTER_ADDR": "node1"}
CRAY = {"PMI_RANK": "9", "PMI_SIZE": "16", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "8", "MASTER_ADDR": "node1"}
NINTH = Ranks(9, 16, 1, 8, "node1", 29500)


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "4"}, ALONE),
        (DEEPSPEED, Ranks(9, 16, 1, 8, "node1", 29501)),
        (TORCHRUN, Ranks(9, 16, 1, 8, "node1", 29501)),
        ({**BATCH, **DEEPSPEED}, Ranks(9, 16, 1, 8, "node1", 29501)),
        ({**SRUN, **DEEPSPEED}, Ranks(9, 16, 1, 8, "node1", 29501)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "23456"}, Ranks(1, 2, 0, 1, "a", 23456)),
        (BATCH, ALONE),
        ({**ALLOCATION}, ALONE),
        ({**BATCH, "SLURM_STEP_ID": "4294967291"}, ALONE),  # the batch script as a step
        ({**BATCH, "SLURM_STEP_ID": "4294967290", "PMIX_RANK": "0"}, ALONE),  # the shell of salloc
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ALONE),  # srun --pty
        ({**SRUN, "MASTER_PORT": "1234"}, Ranks(9, 16, 1, 8, "gpu07", 1234)),
        ({**SRUN, "MASTER_PORT": "1234", "MASTER_ADDR": "x"}, Ranks(9, 16, 1, 8, "x", 1234)),
        ({**SRUN, "MASTER_PORT": "1234", "SLURM_STEP_NUM_NODES": "1"}, Ranks(9, 16, 1, 8, "127.0.0.1", 1234)),
        ({**SRUN, "MASTER_PORT": "1234", "SLURM_CPU_BIND_TYPE": "mask_cpu:"}, Ranks(9, 16, 1, 1, "gpu07", 1234)),
        ({**SRUN, "MASTER_PORT": "1234", "PMIX_RANK": "9"}, Ranks(9, 16, 1, 8, "gpu07", 1234)),
        (OPEN_MPI, NINTH),
        (MVAPICH, NINTH),
        (MPICH, NINTH),
        (CRAY, NINTH),
        ({**OPEN_MPI, "PMIX_RANK": "9"}, NINTH),
        # mpirun in an allocation: its daemon on the other node is a step of one task
        (
            {**ALLOCATION, **OPEN_MPI, "MASTER_ADDR": "", "MASTER_PORT": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
            | {"SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
            Ranks(9, 16, 1, 8, "gpu07", 1),
        ),
        (
            {**OPEN_MPI, "MASTER_ADDR": "", "OMPI_COMM_WORLD_LOCAL_SIZE": "16"},
            Ranks(9, 16, 1, 16, "127.0.0.1", 29500),
        ),
    ],
)
def test_ranks_of_what_launchers_set(environment, ranks):
    assert find_ranks(environment) == ranks


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, ["RANK is set, but WORLD_SIZE is not"]),
        ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE = 'two' is not a number"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK = 2 is none of the ranks of WORLD_SIZE = 2"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["nothing says where rank 0 is", "MASTER_ADDR=HOST"]),
        ({**OPEN_MPI, "MASTER_ADDR": ""}, ["mpirun -x MASTER_ADDR=HOST"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ["PMI_RANK is set, but no rank on the node: set LOCAL_RANK"]),
        ({"PMIX_RANK": "1"}, ["how many processes there are is not"]),
        (
            {name: value for name, value in SRUN.items() if "NODELIST" not in name},
            ["SLURM_PROCID = 9", "nothing says where rank 0 is", "MASTER_ADDR=HOST"],
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, ["nothing says where rank 0 is"]),
    ],
)
def test_several_that_cannot_find_each_other_are_refused(environment, says):
    with pytest.raises(UserError) as refusal:
        find_ranks(environment)
    for text in says:
        assert text in str(refusal.value)


def test_the_port_is_the_same_for_a_job_and_another_for_another_one():
    ports = {find_ranks({**SRUN, "SLURM_PROCID": str(rank)}).port for rank in range(16)}
    others = {find_ranks({**SRUN, "SLURM_JOB_ID": str(job)}).port for job in range(100)}
    steps = {find_ranks({**SRUN, "SLURM_STEP_ID": str(step)}).port for step in range(8)}
    assert len(ports) == 1 and len(others) > 95 and len(steps) == 8
    assert all(10000 <= port < 30000 for port in ports | others | steps)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("a,b", "a"),
        ("node1", "node1"),
        ("r[1-2]n[003-4]", "r1n003"),
        ("x-[1,2]", "x-1"),
    ],
)
def test_the_first_host_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first


def test_slurms_counts():
    assert expand_counts("8(x2),4") == [8, 8, 4] and expand_counts("16") == [16]


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_rank():
    assert device_index(NINTH, 1) == 0 and device_index(NINTH, 8) == 1
    with pytest.raises(UserError, match="process 2 of this node sees 0 GPUs"):
        device_index(NINTH, 0)


def test_the_route_to_this_machine_is_its_loopback():
    assert route_to("127.0.0.1", 29500) == ("127.0.0.1", "127.0.0.1")
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.9") is None


@pytest.mark.parametrize("variable", [{"DEEPSPEED_TIMEOUT": "x"}, {"IJEPA_START_SECONDS": "0"}])
def test_a_time_to_wait_that_is_none_is_refused(variable: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"must be a whole number of \w+ above 0; set another, or unset it"):
        find_ranks(variable)
