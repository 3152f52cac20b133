"""The groups of processes of a run: one for the device's tensors, and one of CPU tensors to agree by."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ijepa_ds.activity import LONG_SECONDS
from ijepa_ds.distributed import STEP_PATIENCE, limit_all_groups
from ijepa_ds.errors import UserError
from ijepa_ds.launch import device_index
from ijepa_ds.meeting import Card, Meeting

_INTERFACE = "GLOO_SOCKET_IFNAME"


def join_groups(meeting: Meeting, device_type: str, backend: str) -> tuple[torch.device, dist.ProcessGroup]:
    """(this process's device, the control group), once all processes of the meeting are in them.

    The control group binds to the network interface of the route to rank 0, unless GLOO_SOCKET_IFNAME names another:
    gloo itself takes the one that the host's own name means, which on many systems no other machine can reach.
    """
    device = own_device(meeting, device_type)
    interface = None if meeting.ranks.alone else meeting.interface()
    if interface is not None:
        os.environ.setdefault(_INTERFACE, interface)
    group: list[dist.ProcessGroup] = []
    mistake = _attempt(lambda: group.append(_make_groups(meeting, device, backend)), meeting)
    meeting.agree("groups", Card(meeting.node, mistake))
    meeting.store.set_timeout(timedelta(seconds=LONG_SECONDS))
    meeting.report_nodes(os.environ.get(_INTERFACE, ""))
    return device, group[0]


def own_device(meeting: Meeting, device_type: str) -> torch.device:
    """This process's device, which no other process of its node has."""
    if device_type == "cpu":
        return torch.device("cpu")
    index, mistake, identity = 0, None, ""
    try:
        index = device_index(meeting.ranks, getattr(torch, device_type).device_count())
    except UserError as error:
        mistake = str(error)
    else:
        getattr(torch, device_type).set_device(index)
        identity = str(getattr(getattr(torch, device_type).get_device_properties(index), "uuid", ""))
    os.environ["LOCAL_RANK"] = str(index)  # what DeepSpeed takes for the device
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed wants both alike
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    meeting.agree("devices", Card(meeting.node, mistake, device=identity))
    return torch.device(device_type, index)


def _make_groups(meeting: Meeting, device: torch.device, backend: str) -> dist.ProcessGroup:
    ranks = meeting.ranks
    on_cpu, patience = device.type == "cpu", timedelta(seconds=meeting.patience)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", meeting.store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=patience if on_cpu else STEP_PATIENCE,
        device_id=device if device.type == "cuda" and not ranks.alone else None,  # as DeepSpeed gives it
    )
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(control, dist.ProcessGroup)
    dist.barrier(control)  # all can speak with all
    limit_all_groups()  # until here the meeting's patience was enough
    return control


def _attempt(action: Callable[[], object], meeting: Meeting) -> str | None:
    """What is to be said where the groups cannot be made."""
    try:
        action()
    except RuntimeError as error:
        if meeting.ranks.alone:
            raise
        interface = os.environ.get(_INTERFACE, "the one of this host's name")
        return (
            f"the processes cannot speak with each other over the interface {interface} "
            f"({str(error).splitlines()[0]}); name one that reaches the other nodes with {_INTERFACE}, and open their "
            "ports to each other"
        )
    return None
