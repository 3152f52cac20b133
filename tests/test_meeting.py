"""How processes meet before a run: here each is a thread, with torch's store between them as between nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from distributed_runs import FOLDER, free_port, tiny_config

from ijepa_ds.config import parse_config
from ijepa_ds.errors import UserError
from ijepa_ds.launch import ALONE, RANK_NAMES, Ranks
from ijepa_ds.meeting import Card, Meeting, disagreement, own_ranks, ranges
from ijepa_ds.run import agreement
from ijepa_ds.run.agreement import agree_on_folder, facts_of
from ijepa_ds.run.folder import RunFolder
from ijepa_ds.run.lock import release

NODES = ("alpha", "alpha", "beta", "beta")


@dataclass
class End:
    """How a process ended: with exit code 2 or an error, or not at all."""

    code: int | None = None
    error: str | None = None


def meet(act: Callable[[Meeting], None], ranks=(0, 1, 2, 3), world_sizes=(4, 4, 4, 4), patience=20.0) -> list[End]:
    """``act`` in each process; the i-th runs on ``NODES[i]``."""
    port, ends = free_port(), [End() for _ in ranks]
    meetings = []  # rank 0's keeps the store

    def process(index: int) -> None:
        try:
            own = Ranks(ranks[index], world_sizes[index], index % 2, 2, "127.0.0.1", port)
            meeting = Meeting(own, patience, NODES[index])
            meetings.append(meeting)
            act(meeting)
        except SystemExit as leaving:
            ends[index].code = leaving.code
        except UserError as error:
            ends[index].error = str(error)

    threads = [threading.Thread(target=process, args=(index,), daemon=True) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a process waits"
    return ends


def the_error(capsys) -> str:
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1, printed
    return printed.strip()


def test_processes_that_agree_go_on_and_hear_what_rank_0_says(capsys):
    words = []

    def act(meeting: Meeting) -> None:
        meeting.agree("start", Card(meeting.node, facts={"code": {"the commit": "1"}}))
        words.append(meeting.tell("word", f"of {meeting.ranks.rank}"))
        meeting.agree("again", Card(meeting.node))

    assert meet(act) == [End()] * 4
    assert words == ["of 0"] * 4 and capsys.readouterr().err == ""


def test_a_mistake_of_one_node_is_told_once_with_its_name_and_ends_all(capsys):
    def act(meeting: Meeting) -> None:
        meeting.agree("start", Card(meeting.node, "x.beton does not exist" if meeting.node == "beta" else None))

    began = time.monotonic()
    assert meet(act) == [End(2)] * 4
    assert the_error(capsys) == "error: node beta: x.beton does not exist" and time.monotonic() - began < 10


def test_a_mistake_before_the_others_have_come_so_far_ends_them_too(capsys):
    """One leaves while the others agree."""

    def act(meeting: Meeting) -> None:
        if meeting.ranks.rank == 3:
            meeting.leave(UserError("no config"))
        meeting.agree("start", Card(meeting.node))

    assert meet(act) == [End(2)] * 4
    assert the_error(capsys) == "error: node beta: no config"


def test_a_mistake_of_all_needs_no_name(capsys):
    assert meet(lambda meeting: meeting.leave(UserError("no such file"))) == [End(2)] * 4
    assert the_error(capsys) == "error: no such file"


def test_a_second_process_of_the_same_rank_is_named(capsys):
    """Both nodes were started with --node_rank 0."""
    ends = meet(lambda meeting: meeting.agree("start", Card(meeting.node)), ranks=(0, 1, 1), world_sizes=(4, 4, 4))
    assert ends == [End(2)] * 3
    message = the_error(capsys)
    assert "a second rank 1 came from there; each node needs a --node_rank of its own" in message


def test_who_has_not_come_is_told_with_those_who_have(capsys):
    ends = meet(lambda meeting: meeting.agree("start", Card(meeting.node)), (0, 1), (16, 16), patience=1.0)
    assert ends == [End(2)] * 2
    message = the_error(capsys)
    assert message.startswith("error: rank 2-15 did not come within 1 s; here are node alpha: look whether the others")


def test_nodes_that_count_themselves_otherwise_are_told(capsys):
    ends = meet(lambda meeting: meeting.agree("start", Card(meeting.node)), (0, 1, 2), (2, 2, 3))
    assert ends[2].error == "node beta: rank 2 is one of 3, but rank 0 one of 2; give every node the same list of nodes"


def test_a_process_that_is_alone_meets_nobody():
    meeting = Meeting(ALONE)
    meeting.agree("start", Card("alpha"))
    with pytest.raises(UserError, match="what is wrong"):
        meeting.agree("start", Card("alpha", "what is wrong"))
    with pytest.raises(UserError, match="what is wrong"):
        meeting.leave(UserError("what is wrong"))


def test_a_run_folder_that_is_not_shared_is_named(capsys, monkeypatch):
    monkeypatch.setattr(RunFolder.sees, "__defaults__", (0.3,))
    folders = {
        node: RunFolder(parse_config(tiny_config(ijepa__run__folder=str(FOLDER / f"runs_{node}"))))
        for node in ("alpha", "beta")
    }
    assert meet(lambda meeting: meeting_of_folder(meeting, folders[meeting.node])) == [End(2)] * 4
    assert f"node beta: {folders['beta'].path} is not rank 0's folder of that name" in the_error(capsys)
    assert meet(lambda meeting: meeting_of_folder(meeting, folders["alpha"])) == [End()] * 4
    assert [path.name for path in folders["alpha"].path.iterdir()] == ["run.lock"], "a mark is left"
    assert not folders["beta"].path.exists()
    release(folders["alpha"].path)


def meeting_of_folder(meeting: Meeting, folder: RunFolder) -> None:
    meeting.agree("start", Card(meeting.node))
    agree_on_folder(meeting, folder)


def test_what_a_run_must_have_alike(tmp_path, monkeypatch):
    path = tmp_path / "x.beton"
    path.write_bytes(b"12345")

    def facts(num_images: int = 7, whole: bool = True, **changes: object) -> dict:
        config = parse_config(tiny_config(ijepa__data__train=str(path), **changes))
        return facts_of(config, num_images, [config.ijepa.data.train], whole=whole)

    def between(other: dict) -> str | None:
        return disagreement({0: Card("alpha", facts=facts()), 1: Card("beta", facts=other)}, 2)

    assert between(facts()) is None and between(facts(whole=False)) is None
    assert between(facts(num_images=8)) == (
        "node beta: the number of images in ijepa.data.train is 8 there, 7 on node alpha; a run needs it alike "
        "everywhere"
    )
    assert "node beta: the number of images in ijepa.data.train is 8" in str(between(facts(num_images=8, whole=False)))
    assert "ijepa.model.depth is 3 there, 2 on node alpha" in str(between(facts(ijepa__model__depth=3)))
    assert "ijepa.model.depth is 3 there" in str(between(facts(whole=False, ijepa__model__depth=3)))  # on one node too
    several = str(between(facts(ijepa__model__depth=3, ijepa__run__seed=5)))
    assert several.startswith("the nodes do not agree:\n  - ") and several.count("\n  - node beta: ") == 2
    before = facts()
    monkeypatch.setattr(agreement, "git_commit", lambda: "another")
    monkeypatch.setattr(agreement, "versions", lambda: {"torch": "1.0"})
    assert disagreement({0: Card("alpha", facts=before), 1: Card("beta", facts=facts())}, 2).count("\n  - ") > 1
    path.write_bytes(b"123456")
    assert f"the size of {path} is 6 bytes there, 5 bytes on node alpha" in str(
        disagreement({0: Card("alpha", facts=before), 1: Card("beta", facts=facts(whole=False))}, 2)
    )


def test_processes_on_one_gpu_are_named():
    cards = {
        0: Card("alpha", device="u1"),
        1: Card("alpha", device="u1"),
        2: Card("beta", device="u1"),
        3: Card("beta"),
    }
    assert disagreement(cards, 4) == "node alpha: ranks 0-1 have the same GPU; start as many processes as GPUs"


def test_the_interface_of_a_master_that_calls_itself_by_its_loopback(monkeypatch):
    """MASTER_ADDR is rank 0's own name, which Debian's /etc/hosts gives as 127.0.1.1."""
    own = {"127.0.0.1": "lo", "10.0.0.1": "eth1"}
    monkeypatch.setattr("ijepa_ds.meeting.interface_of", own.get)
    found = {}

    def act(meeting: Meeting) -> None:
        meeting.master = "127.0.1.1" if meeting.node == "alpha" else "10.0.0.1"
        meeting.agree("start", Card(meeting.node))
        found[meeting.ranks.rank] = meeting.interface()

    assert meet(act) == [End()] * 4
    assert found[0] == "eth1"


def test_numbers_in_short():
    assert ranges([0, 2, 3, 4, 7]) == "0, 2-4, 7" and ranges([]) == ""


def test_a_rank_that_alone_is_wrong_says_so(monkeypatch):
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **there}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK"):
        own_ranks()
