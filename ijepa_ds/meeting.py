"""How the processes of a run meet before it begins: all come and agree, or all leave with one sentence of rank 0's.

They talk through torch's store, which rank 0 keeps: it needs no group of processes, and it knows who has come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from pydantic import TypeAdapter

from ijepa_ds.errors import UserError, listing, report, some
from ijepa_ds.launch import RANK_NAMES, Ranks, find_ranks, interface_of, route_to
from ijepa_ds.validation import parse_json, reason

PATIENCE = "IJEPA_START_SECONDS"  # the variable that says how long to wait for others, in seconds
_PATIENCE = 120.0
_GRACE = 6.0  # seconds for others to come and say the same, once one has said what is wrong
_SILENT = 10.0  # seconds until rank 0 says for whom it waits
_APART = 2.0  # seconds for another process to speak first
_ALIKE = "a run needs it alike everywhere"

Facts = dict[str, dict[str, str]]  # what -> name -> value


@dataclass(frozen=True)
class Card:
    """What a process says when it comes.

    Args:
        node: the name of its machine.
        mistake: a sentence where it cannot go on.
        facts: what all must have alike, by kind; a kind that a process does not give is not compared with its.
        device: what tells its GPU from all others of its machine.
        master: the address at which it reaches rank 0.
    """

    node: str
    mistake: str | None = None
    facts: Facts = field(default_factory=dict)
    device: str = ""
    master: str = ""


_CARDS = TypeAdapter(Card)


def node_name() -> str:
    """This machine's name: SLURM's where it has one, for that is what an operator types."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Meeting:
    """The processes of a run while it starts; every method is called by all of them, ``leave`` apart.

    Args:
        ranks: who this process is.
        patience: seconds to wait for the others.
        node: the name of this machine.

    Raises:
        UserError: rank 0 cannot be reached, or its port is taken.
    """

    def __init__(self, ranks: Ranks, patience: float | None = None, node: str | None = None) -> None:
        self.ranks, self.node = ranks, node or node_name()
        self.patience = float(os.environ.get(PATIENCE, _PATIENCE)) if patience is None else patience
        self.address = self.master = "127.0.0.1"
        self.begun = False
        if ranks.alone:
            self.store: dist.Store = dist.HashStore()
            return
        self.address, self.master = self._route()
        store = self._connect()
        store.set_timeout(timedelta(seconds=self.patience))
        self.store = _of_this_attempt(store)
        if self.store.add(f"came_{ranks.rank}", 1) > 1:
            self.store.set("twice", f"{ranks.rank} {self.node}")
            self._leave_when_told("start")

    def agree(self, topic: str, card: Card) -> None:
        """Go on only if :func:`disagreement` finds nothing in the cards of all: else all leave with exit code 2."""
        self.begun = True
        if self.ranks.alone:
            if card.mistake:
                raise UserError(card.mistake)
            return
        with self._reporting():
            card = dataclasses.replace(card, master=self.master)
            self.store.set(f"{topic}_{self.ranks.rank}", json.dumps(dataclasses.asdict(card)))
            if self.ranks.rank > 0:
                return self._follow(topic)
            cards, mistake = self._collect(topic)
            mistake = mistake or disagreement(cards, self.ranks.world_size)
            if mistake is None:
                self.store.set("addresses", " ".join({card.master for card in cards.values()}))
                self.store.set(f"verdict_{topic}", str(self.ranks.world_size))
                return
            report(mistake)  # before the others leave: a launcher ends this process when one of them does
            self.store.set(f"verdict_{topic}", "")
            self._wait_until_heard(len(cards) - 1)
        sys.exit(2)

    def tell(self, topic: str, word: str) -> str:
        """Rank 0's word, on all."""
        if self.ranks.rank == 0:
            self.store.set(f"word_{topic}", word)
            return word
        with self._reporting():
            return self._get(f"word_{topic}")

    def leave(self, error: UserError) -> NoReturn:
        """End this process with its error, and all others that come here: rank 0 prints what they say."""
        if self.ranks.alone:
            raise error
        topic, begun = ("leave" if self.begun else "start"), self.begun
        if begun:  # the others may be busy with each other: then this one speaks for itself
            self.patience = min(self.patience, _GRACE)
        with contextlib.suppress(UserError):
            self.agree(topic, Card(self.node, str(error)))
        raise error

    def interface(self) -> str | None:
        """After ``agree``: the network interface of the route to rank 0.

        Where MASTER_ADDR is rank 0's own name it may mean 127.0.1.1 there: then it is the one that others reach.
        """
        found = interface_of(self.address)
        if self.ranks.alone or not ipaddress.ip_address(self.address.partition("%")[0]).is_loopback:
            return found
        reached = self._get("addresses").split()
        outside = [address for address in reached if not ipaddress.ip_address(address).is_loopback]
        return next((name for address in outside if (name := interface_of(address))), found)

    def report_nodes(self, interface: str) -> None:
        """Rank 0 prints which nodes there are, and over which interface each speaks, if there are several."""
        if self.ranks.alone:
            return
        with self._reporting():
            self.store.set(f"node_{self.ranks.rank}", f"{self.node} ({interface}, {self.address})")
            if self.ranks.rank == 0:
                nodes = Counter(self._get(f"node_{rank}") for rank in range(self.ranks.world_size))
                if len(nodes) > 1:
                    counts = some(f"{count} on {node}" for node, count in nodes.items())
                    print(f"{self.ranks.world_size} processes, {counts}; rank 0 is {self.node}", flush=True)

    def second_line(self, timeout: float) -> tuple[dist.Store, socket.socket]:
        """Another connection to the store, for another thread: one waits until a request on it is answered.

        The socket beside it is never written to: the end of the store can be read from it, without a request that
        would fail and fill the console. ``timeout``: seconds of a request.
        """
        place = self.ranks.master, self.ranks.port
        try:
            store = dist.TCPStore(*place, None, False, timedelta(seconds=timeout), wait_for_workers=False)
            return _of_this_attempt(store), socket.create_connection(place, timeout=self.patience)
        except (RuntimeError, OSError) as error:
            raise UserError(f"node {self.node}: rank 0 has gone ({str(error).splitlines()[0]})") from None

    # ------------------------------------------------------------------------------------------------- how it is done

    def _route(self) -> tuple[str, str]:
        try:
            return route_to(self.ranks.master, self.ranks.port)
        except OSError as error:
            _let_the_first_of_a_node_speak(self.ranks)
            raise UserError(
                f"node {self.node}: MASTER_ADDR = {self.ranks.master} cannot be reached ({error.strerror or error}); "
                "give the name or address of rank 0's node as the other nodes know it"
            ) from error

    def _connect(self) -> dist.TCPStore:
        ranks = self.ranks
        keeps = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not keeps:
            self._wait_for_port()
        try:
            timeout = timedelta(seconds=self.patience)
            return dist.TCPStore(ranks.master, ranks.port, None, keeps, timeout, wait_for_workers=False)
        except RuntimeError as error:  # torch's own kinds are of it
            if "EADDRINUSE" in str(error):
                reason = "the port is taken by another program or run; choose another MASTER_PORT (--master_port)"
            else:
                reason = "; ".join(str(error).splitlines()[:1]) + "; is MASTER_ADDR the node of rank 0?"
            raise UserError(f"node {self.node}: no meeting at {ranks.master}:{ranks.port}: {reason}") from None

    def _wait_for_port(self) -> None:
        """Until rank 0 listens. torch's own waiting would fill the console."""
        end = time.monotonic() + self.patience
        while True:
            try:
                socket.create_connection((self.ranks.master, self.ranks.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    _let_the_first_of_a_node_speak(self.ranks)
                    raise UserError(
                        f"node {self.node}: rank {self.ranks.rank} waited {self.patience:.0f} s for rank 0 at "
                        f"{self.ranks.master}:{self.ranks.port} ({error.strerror or error}); is it started, and is "
                        "its port open to other nodes?"
                    ) from error
                time.sleep(0.1)

    def _collect(self, topic: str) -> tuple[dict[int, Card], str | None]:
        """The cards of those who come, and what was wrong with their coming."""
        cards: dict[int, Card] = {}
        began, mistaken_since, announced = time.monotonic(), None, False
        while missing := [rank for rank in range(self.ranks.world_size) if rank not in cards]:
            for rank in missing:
                if self.store.check([f"{topic}_{rank}"]):
                    cards[rank] = self._read_card(rank, self.store.get(f"{topic}_{rank}"))
            waited = time.monotonic() - began
            if mistaken_since is None and any(card.mistake for card in cards.values()):
                mistaken_since = waited
            if mistaken_since is not None and waited - mistaken_since > _GRACE:
                break
            if problem := self._second_coming():
                return cards, problem
            missing = [rank for rank in missing if rank not in cards]
            if missing and waited > self.patience:
                return cards, absence(missing, cards.values(), self.patience)
            if missing and not announced and waited > _SILENT:
                announced = True
                print(f"waiting for rank {ranges(missing)}; here: {_nodes(cards.values())}", flush=True)
            time.sleep(0.2 if waited > 2 else 0.01)
        return {rank: cards[rank] for rank in sorted(cards)}, None

    def _read_card(self, rank: int, said: bytes) -> Card:
        """A process's card; one that cannot be understood is a mistake of that process."""
        try:
            return _CARDS.validate_json(json.dumps(parse_json(said)), strict=True)
        except ValueError as error:  # pydantic's errors are of it
            mistake = f"rank {rank} said what is not understood here ({reason(error)}); {_ALIKE}"
            return Card(f"of rank {rank}", mistake)

    def _second_coming(self) -> str | None:
        if not self.store.check(["twice"]):
            return None
        rank, node = self.store.get("twice").decode().split(" ", 1)
        return (
            f"node {node}: a second rank {rank} came from there; each node needs a --node_rank of its own, and each "
            "run a MASTER_PORT"
        )

    def _follow(self, topic: str) -> None:
        """What rank 0 makes of the cards."""
        verdict = self._get(f"verdict_{topic}")
        if not verdict:
            self.store.add("heard", 1)
            sys.exit(2)
        if verdict != str(self.ranks.world_size):
            raise UserError(
                f"node {self.node}: rank {self.ranks.rank} is one of {self.ranks.world_size}, but rank 0 one of "
                f"{verdict}; give every node the same list of nodes"
            )

    def _get(self, key: str) -> str:
        """What is said under ``key``, when it is; rank 0 itself waits no longer than its patience."""
        end = time.monotonic() + self.patience + 3 * _GRACE
        pause = 0.01
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise UserError(f"node {self.node}: rank 0 has said nothing for {self.patience + 3 * _GRACE:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return self.store.get(key).decode()

    def _leave_when_told(self, topic: str) -> NoReturn:
        with self._reporting():
            self._get(f"verdict_{topic}")
        sys.exit(2)

    def _wait_until_heard(self, others: int) -> None:
        """Until those who came know: the store ends with this process."""
        end = time.monotonic() + 3
        while self.store.add("heard", 0) < others and time.monotonic() < end:
            time.sleep(0.02)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """A store that breaks off is rank 0 that has gone; it may have said why."""
        try:
            yield
        except dist.DistError as error:
            _let_the_first_of_a_node_speak(self.ranks)
            raise UserError(f"node {self.node}: rank 0 has gone ({str(error).splitlines()[0]})") from None


def _of_this_attempt(store: dist.Store) -> dist.PrefixStore:
    """Torchrun's store outlives its processes."""
    return dist.PrefixStore(f"ijepa_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def disagreement(cards: dict[int, Card], world_size: int) -> str | None:
    """What keeps these processes from being one run, if anything does: a sentence that names the nodes."""
    problems: dict[str, list[str]] = defaultdict(list)  # sentence -> nodes
    for card in cards.values():
        if card.mistake:
            problems[card.mistake].append(card.node)
    if [len(nodes) for nodes in problems.values()] == [world_size]:
        return next(iter(problems))  # everybody's
    if not problems:
        for card in cards.values():
            for name, ours, theirs in _differing(cards[0].facts, card.facts):
                problems[f"{name} is {theirs} there, {ours} on node {cards[0].node}; {_ALIKE}"].append(card.node)
        for ranks, card in _on_one_device(cards):
            problems[f"ranks {ranges(ranks)} have the same GPU; start as many processes as GPUs"].append(card.node)
    sentences = [f"{_named(nodes)}: {sentence}" for sentence, nodes in problems.items()]
    if len(sentences) > 1:
        return f"the nodes do not agree:{listing(sentences, shown=20)}"
    return sentences[0] if sentences else None


def _differing(first: Facts, other: Facts) -> list[tuple[str, str, str]]:
    """(name, value there, value here) of the kinds that both give."""
    differing = []
    for kind in first.keys() & other.keys():
        ours, theirs = first[kind], other[kind]
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                differing.append((name, ours.get(name, "not there"), theirs.get(name, "not there")))
    return differing


def _on_one_device(cards: dict[int, Card]) -> list[tuple[list[int], Card]]:
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, card in cards.items():
        if card.device:
            holders[card.node, card.device].append(rank)
    return [(ranks, cards[ranks[0]]) for ranks in holders.values() if len(ranks) > 1]


def absence(missing: Sequence[int], cards: Iterable[Card], seconds: float) -> str:
    """The sentence about ranks that have not come."""
    return (
        f"rank {ranges(missing)} did not come within {seconds:.0f} s; here are {_nodes(cards)}: look whether the "
        f"others were started and can reach this node, or give them more time with {PATIENCE}"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``0, 2-5, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return some(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _nodes(cards: Iterable[Card]) -> str:
    return _named(card.node for card in cards) or "none"


def _named(nodes: Iterable[str]) -> str:
    names = list(dict.fromkeys(nodes))
    return f"node{'s' if len(names) > 1 else ''} {some(names)}"


def own_ranks() -> Ranks:
    """Who this process is; where that cannot be known, the first of all tells why, unless only this one's is wrong."""
    try:
        return find_ranks(os.environ)
    except UserError as error:
        if all(os.environ.get(name, "0") == "0" for name in RANK_NAMES):
            raise
        first = {**os.environ, **{name: "0" for name in RANK_NAMES if name in os.environ}}
        try:
            find_ranks(first)
        except UserError:
            time.sleep(_APART)
            sys.exit(2)
        raise error


@functools.cache
def join() -> Meeting:
    """The meeting of this process's run: there is one."""
    return Meeting(own_ranks())


def _let_the_first_of_a_node_speak(ranks: Ranks) -> None:
    """A node's other processes leave without a word, and late: a launcher ends the first when one of them does."""
    if ranks.local_rank > 0:
        time.sleep(_APART)
        sys.exit(2)
