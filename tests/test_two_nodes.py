"""A run on two nodes, each a network namespace of this machine with its own address, name and view of the files.

The long ones wait for ``-m long``: the comparison itself is tested in ``test_meeting.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_runs import FOLDER, ROOT, bare_run, run_folder, tiny_config, train_beton
from two_nodes import Node, train_on, two_nodes

from ijepa_ds.engine.checkpoint_files import list_checkpoints

SECONDS = 20.0  # until all processes of a run that cannot be have ended, after they were started


def hide(nodes: tuple[Node, Node], path: Path, instead: Path | None = None) -> tuple[Node, Node]:
    """The second node sees something else at ``path``: nothing, or what is at ``instead``."""
    alpha, beta = nodes
    return alpha, Node(beta.name, beta.namespace, beta.address, ((str(path), instead and str(instead)),))


def refusal(nodes: tuple[Node, Node], config: dict, **how) -> str:
    """The one error of all ranks, which must come in time and from rank 0."""
    run, outputs, seconds = train_on(nodes, config, timeout=3 * SECONDS, **how)
    if 77 in run.exit_codes:
        pytest.skip(f"namespaces may not be entered here: {run.output.strip()}")
    assert run.exit_codes == [2] * len(run.exit_codes), run.output
    assert run.output.count("error:") == 1 and "Traceback" not in run.output, run.output
    assert "error:" in outputs[0] and seconds < SECONDS, (seconds, run.output)
    assert not list_checkpoints(run_folder(config) / "checkpoints")
    return outputs[0][outputs[0].index("error:") :].strip()


def data_of_its_own() -> Path:
    """The training images in a folder of their own."""
    train_beton()
    folder = FOLDER / "data_of_nodes"
    folder.mkdir(exist_ok=True)
    copy = folder / "train.beton"
    if not copy.exists():
        copy.write_bytes((FOLDER / "train.beton").read_bytes())
    return copy


def test_a_beton_that_one_node_lacks_is_named_with_the_node() -> None:
    data = data_of_its_own()
    with two_nodes() as nodes:
        config = tiny_config(ijepa__run__name="lacking", ijepa__data__train=str(data))
        message = refusal(hide(nodes, data.parent), config)
    assert message.startswith(f"error: node beta: {data} does not exist; make it with: python data_prep/to_ffcv.py")
    assert not (FOLDER / "runs" / "lacking").exists()


@pytest.mark.long
def test_two_nodes_learn_what_one_process_does() -> None:
    with two_nodes() as nodes:
        run, outputs, _ = train_on(nodes, tiny_config(ijepa__run__name="two_nodes"))
    if 77 in run.exit_codes:
        pytest.skip(f"namespaces may not be entered here: {run.output.strip()}")
    assert run.exit_codes == [0, 0], run.output
    assert run.losses == pytest.approx(bare_run(1).losses, rel=1e-6)
    interfaces = [f"1 on {node.name} ({node.namespace}, {node.address})" for node in nodes]
    assert f"2 processes, {interfaces[0]}, {interfaces[1]}; rank 0 is alpha" in outputs[0]


@pytest.mark.long
def test_a_folder_that_is_not_shared_is_refused() -> None:
    folder = FOLDER / "runs_of_nodes"
    folder.mkdir(exist_ok=True)
    with two_nodes() as nodes:
        config = tiny_config(ijepa__run__name="apart", ijepa__run__folder=str(folder))
        message = refusal(hide(nodes, folder), config, ranks_a_node=2)
    assert message.startswith(f"error: node beta: {folder / 'apart'} is not rank 0's folder of that name")
    assert "ijepa.run.folder" in message and not (folder / "apart").exists()


@pytest.mark.long
def test_other_code_on_one_node_is_refused() -> None:
    other = FOLDER / "other_version.py"
    source = ROOT / "ijepa_ds" / "__init__.py"
    other.write_text(source.read_text() + "\n# another commit\n")
    with two_nodes() as nodes:
        message = refusal(hide(nodes, source, other), tiny_config(ijepa__run__name="other_code"))
    assert "node beta: the hash of the source files is " in message and "on node alpha; a run needs it alike" in message


@pytest.mark.long
def test_a_rank_0_that_is_elsewhere_is_looked_for_no_longer_than_asked() -> None:
    with two_nodes() as (alpha, beta):
        nobody = (Node("alpha", alpha.namespace, "10.213.7.9"), beta)  # MASTER_ADDR is no machine's
        config = tiny_config(ijepa__run__name="nobody")
        run, outputs, seconds = train_on(nobody, config, timeout=60, IJEPA_START_SECONDS="5")
    if 77 in run.exit_codes:
        pytest.skip(f"namespaces may not be entered here: {run.output.strip()}")
    assert set(run.exit_codes) == {2} and "node beta: rank 1 waited 5 s for rank 0 at 10.213.7.9:29511" in outputs[1]
    assert seconds < SECONDS + 10, (seconds, run.output)


@pytest.mark.long
@pytest.mark.parametrize("interface", ["lo", "no_such"])
def test_an_interface_that_does_not_reach_the_other_node_is_named(interface) -> None:
    """The second node may find out later than rank 0 waits for it; then it says that rank 0 has gone."""
    with two_nodes() as nodes:
        config, how = tiny_config(ijepa__run__name="interface"), {"GLOO_SOCKET_IFNAME": interface}
        run, outputs, _ = train_on(nodes, config, timeout=120, IJEPA_START_SECONDS="5", **how)
    if 77 in run.exit_codes:
        pytest.skip(f"namespaces may not be entered here: {run.output.strip()}")
    assert run.exit_codes == [2, 2] and "Traceback" not in run.output, run.output
    says = outputs[0][outputs[0].index("error:") :]
    assert f"the processes cannot speak with each other over the interface {interface} (" in says
    assert "GLOO_SOCKET_IFNAME" in says
