"""Clusters by name, and what a name that is not known is answered with."""

from __future__ import annotations

import pytest

from ijepa_ds.errors import UserError
from ijepa_ds.plan.gpus import GPUS, NETWORKS, build_cluster, check_network


def test_nodes_of_eight_with_a_port_for_each_gpu() -> None:
    cluster = build_cluster("A100-80", 16)
    assert (cluster.nodes, cluster.per_node, cluster.network) == (2, 8, NETWORKS["ib-200"])
    assert cluster.bandwidth(8) == GPUS["a100-80"].link
    assert cluster.bandwidth(16) == 8 * 25
    assert build_cluster("h100", 4).network is None


def test_a_slow_network_is_shared_by_a_node() -> None:
    assert build_cluster("h100", 16, network="25gbe").bandwidth(16) == 3.125
    assert build_cluster("h100", 16, nodes=1, network="none").bandwidth(16) == GPUS["h100"].link


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: build_cluster("a1000", 8), r"--gpu a1000 is not known; choose one of: a100-40, .*, v100$"),
        (lambda: build_cluster("h100", 16, network="ib-100"), r"--interconnect ib-100 .* choose one of: ib-200, .*"),
        (lambda: check_network("wifi"), r"--interconnect wifi is not known; choose one of: none, ib-200, "),
        (lambda: build_cluster("h100", 12, nodes=5), "12 GPUs do not divide into 5 equal nodes"),
        (lambda: build_cluster("h100", 9), "9 GPUs do not divide into 2 equal nodes; give --nodes that divide them"),
        (lambda: build_cluster("h100", 0), "--gpus = 0 must be at least 1"),
        (lambda: build_cluster("h100", 16, network="none"), "--interconnect none does not go with 2 nodes"),
    ],
)
def test_what_cannot_be_is_refused(call, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()
