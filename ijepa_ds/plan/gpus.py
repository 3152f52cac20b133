"""GPUs and networks that a plan knows, by their data sheets: peaks of dense products, no sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ijepa_ds.errors import UserError

GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as people write it.
        memory: GB as they are sold, 1e9 bytes; torch sees as much, or up to 7 % more.
        bf16: TFLOP/s of products in bf16 with sums in fp32; 0: no arithmetic for it.
        fp32: TFLOP/s in fp32 without TF32, which no run uses unasked.
        bandwidth: of its memory, GB/s.
        link: GB/s in one direction to the other GPUs of its node.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float


GPUS = {
    "a100-40": Gpu("A100 40GB", 40, 312, 19.5, 1555, 300),
    "a100-80": Gpu("A100 80GB", 80, 312, 19.5, 2039, 300),
    "h100": Gpu("H100 80GB", 80, 989, 67, 3350, 450),
    "h200": Gpu("H200", 141, 989, 67, 4800, 450),
    "b200": Gpu("B200", 180, 2250, 75, 8000, 900),
    "l40s": Gpu("L40S", 48, 362, 91.6, 864, 32),
    "rtx3090": Gpu("RTX 3090", 24, 71, 35.6, 936, 32),
    "rtx4090": Gpu("RTX 4090", 24, 165, 82.6, 1008, 32),
    "rtx5090": Gpu("RTX 5090", 32, 209, 104.8, 1792, 64),
    "v100": Gpu("V100 32GB", 32, 0, 15.7, 900, 150),
}


@dataclass(frozen=True)
class Network:
    """Between nodes: GB/s in one direction of a whole node, shared by its GPUs; ``per_gpu``: of each GPU."""

    name: str
    bandwidth: float
    per_gpu: bool = False

    def of_node(self, gpus: int) -> float:
        """GB/s of a node with so many GPUs."""
        return self.bandwidth * (gpus if self.per_gpu else 1)


NETWORKS = {
    "ib-200": Network("InfiniBand, 200 Gb/s a GPU", 25, per_gpu=True),
    "ib-400": Network("InfiniBand, 400 Gb/s a GPU", 50, per_gpu=True),
    "efa-400": Network("EFA, 400 Gb/s a node", 50),
    "efa-3200": Network("EFA, 3200 Gb/s a node", 400),
    "100gbe": Network("Ethernet, 100 Gb/s a node", 12.5),
    "25gbe": Network("Ethernet, 25 Gb/s a node", 3.125),
    "10gbe": Network("Ethernet, 10 Gb/s a node", 1.25),
}
NO_NETWORK = "none"
USUAL_NETWORK = "ib-200"
Known = TypeVar("Known")


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with the same number of GPUs each."""

    gpu: Gpu
    gpus: int
    nodes: int = 1
    network: Network | None = None

    @property
    def per_node(self) -> int:
        """GPUs of a node."""
        return self.gpus // self.nodes

    def bandwidth(self, ranks: int) -> float:
        """GB/s of a ring through so many GPUs, neighbours as far as a node goes."""
        if ranks <= self.per_node or self.network is None:
            return self.gpu.link
        return min(self.gpu.link, self.network.of_node(self.per_node))


def gpu_named(name: str) -> Gpu:
    """By the name on the command line, whatever its case."""
    return _known(GPUS, name, "--gpu")


def build_cluster(gpu: str, gpus: int, *, nodes: int | None = None, network: str | None = None) -> Cluster:
    """Of the command line's values; nodes of eight GPUs with one port each, where it does not say.

    Raises:
        UserError: unknown names, or GPUs that do not divide into the nodes.
    """
    kind = gpu_named(gpu)
    if gpus < 1:
        raise UserError(f"--gpus = {gpus} must be at least 1")
    count = -(-gpus // GPUS_OF_A_NODE) if nodes is None else nodes
    if count < 1 or gpus % count:
        cure = "give --nodes that divide them" if nodes is None else "give another number of one or the other"
        raise UserError(f"{gpus} GPUs do not divide into {count} equal nodes; {cure}")
    if count == 1:
        return Cluster(kind, gpus)
    if network == NO_NETWORK:
        raise UserError(f"--interconnect none does not go with {count} nodes; choose one of: {', '.join(NETWORKS)}")
    return Cluster(kind, gpus, count, _known(NETWORKS, network or USUAL_NETWORK, "--interconnect"))


def check_network(name: str | None) -> None:
    """Refuse an unknown name, also where one node needs none."""
    if name not in (None, NO_NETWORK):
        _known(NETWORKS, str(name), "--interconnect", (NO_NETWORK,))


def _known(table: Mapping[str, Known], name: str, option: str, others: tuple[str, ...] = ()) -> Known:
    if name.lower() not in table:
        raise UserError(f"{option} {name} is not known; choose one of: {', '.join([*others, *table])}")
    return table[name.lower()]
