"""A plan over numbers of GPUs, as a picture: memory by what it is for, and the time of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ijepa_ds.errors import UserError
from ijepa_ds.plan.gpus import GPUS_OF_A_NODE, NETWORKS, USUAL_NETWORK, Cluster
from ijepa_ds.plan.predict import Plan

_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_GB = 1e9
# Okabe and Ito's colours, distinct for colour-blind readers too.
_STATE, _BUCKETS, _ACTIVATIONS, _OTHER, _IDEAL = "#0072B2", "#56B4E9", "#E69F00", "#999999", "#333333"


def over_gpus(plan: Plan) -> list[dict[str, Any]]:
    """Memory (GB) and hours on 1 to 64 GPUs, as far as stages and batch divide; a micro-batch is at most a share."""
    rows = []
    for gpus in _COUNTS:
        at = _on(plan, gpus)
        if at is None:
            continue
        memory, hours = at.memory(), at.hours()
        rows.append(
            {
                "gpus": gpus,
                "micro_batch": at.work.micro_batch,
                "state_gb": memory.state / _GB,
                "buckets_gb": memory.buckets / _GB,
                "activations_gb": memory.activations / _GB,
                "other_gb": (memory.working + memory.images + memory.outside) / _GB,
                "memory_gb": memory.total / _GB,
                "fits": memory.total <= at.room,
                "hours": hours,
                "gpu_hours": hours * gpus,
            }
        )
    return rows


def _on(plan: Plan, gpus: int) -> Plan | None:
    """The same run on another number of GPUs, in nodes as full as its own or of eight."""
    work, cluster = plan.work, plan.cluster
    of_node = cluster.per_node if cluster.nodes > 1 else max(GPUS_OF_A_NODE, cluster.gpus)
    nodes = max(1, gpus // of_node)
    if gpus % work.stages or work.global_batch % (gpus // work.stages) or gpus % nodes:
        return None
    share = work.global_batch * work.stages // gpus
    micro_batch = next(
        (n for n in range(min(work.micro_batch, share), 0, -1) if share % n == 0 and n % work.stages == 0), None
    )
    if micro_batch is None:
        return None
    network = None if nodes == 1 else cluster.network or NETWORKS[USUAL_NETWORK]
    changed = dataclasses.replace(work, micro_batch=micro_batch)
    return dataclasses.replace(plan, work=changed, cluster=Cluster(cluster.gpu, gpus, nodes, network))


def draw(plan: Plan, rows: list[dict[str, Any]], path: Path) -> None:
    """Write the PNG. UserError: it cannot be written."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, time = figure.subplots(1, 2)
    places, names = range(len(rows)), [str(row["gpus"]) for row in rows]
    bottom = [0.0] * len(rows)
    for key, colour, label in (
        ("state_gb", _STATE, "weights, gradients, optimizer, average, target"),
        ("buckets_gb", _BUCKETS, "buckets"),
        ("activations_gb", _ACTIVATIONS, "activations"),
        ("other_gb", _OTHER, "the rest"),
    ):
        heights = [row[key] for row in rows]
        memory.bar(places, heights, bottom=bottom, color=colour, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    memory.axhline(plan.room / _GB, color=_IDEAL, linestyle="--", label=f"{plan.cluster.gpu.name}: of use")
    memory.set_xticks(places, names)
    memory.set(xlabel="GPUs", ylabel="GB of a GPU", title="memory at the largest target blocks")
    memory.set_ylim(0, 1.45 * max(plan.room / _GB, *bottom))
    memory.legend(fontsize=8, loc="upper right")
    hours = [row["hours"] for row in rows]
    ideal = [hours[0] * rows[0]["gpus"] / row["gpus"] for row in rows]
    time.plot(places, hours, "o-", color=_STATE, label="predicted")
    time.plot(places, ideal, "--", color=_IDEAL, label="in proportion")
    for place, row in enumerate(rows):
        time.annotate(
            f"{row['hours']:,.0f}", (place, row["hours"]), textcoords="offset points", xytext=(4, 6), fontsize=8
        )
    time.set_xticks(places, names)
    time.set(xlabel="GPUs", ylabel="hours", yscale="log", title="time of the run")
    time.legend(fontsize=8)
    figure.suptitle(
        f"prediction, {plan.cluster.gpu.name}, products at {plan.terms.efficiency:.0%} of the peak", fontsize=11
    )
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); give another --png") from error
