"""Workers of several tensor-parallel ranks hand blocks to each other, also when they divide the heads differently."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kv_transfer.inbound import Inbound
from tests.support.kv_node import DEADLINE_S, KvNode, content, new_handoff

HEADS = 4
IDS, TARGETS = [9, 3, 4, 40], [7, 20, 21, 5]
_epochs = itertools.count(1 << 40)


@dataclass
class Ranks:
    """A worker."""

    nodes: list[KvNode]
    epoch: int

    @property
    def addresses(self) -> list[str]:
        return [node.address for node in self.nodes]

    def send(self, handoff: str, *, end: int = -1) -> None:
        for node in self.nodes:
            node.begin(handoff)
            node.publish(handoff, IDS, 0, end)

    def open(self, handoff: str, sender: Ranks) -> None:
        for node in self.nodes:
            node.open(handoff, sender.addresses[0], sender.epoch, ranks=sender.addresses)

    def receive(self, handoff: str) -> None:
        for node in self.nodes:
            node.until("Started", handoff)
        for node in self.nodes:
            node.receive(handoff, TARGETS)

    def write(self, block: int, seed: str) -> None:
        """Every head of a block with bytes of its own."""
        for rank, node in enumerate(self.nodes):
            for region, length in enumerate(node.memory.piece_bytes):
                heads = _heads(rank, len(self.nodes))
                data = b"".join(content(f"{seed}/{head}", region, length // len(heads)) for head in heads)
                node.memory.fill(region, block, memoryview(bytearray(data)))

    def holds(self, block: int, seed: str) -> bool:
        return all(
            bytes(node.memory.piece(region, block))
            == b"".join(content(f"{seed}/{head}", region, length // len(heads)) for head in heads)
            for rank, node in enumerate(self.nodes)
            for heads in [_heads(rank, len(self.nodes))]
            for region, length in enumerate(node.memory.piece_bytes)
        )


def _heads(rank: int, ranks: int) -> list[int]:
    each = max(1, HEADS // ranks)
    first = rank * HEADS // ranks
    return list(range(first, first + each))


@pytest.fixture
def worker(make: Callable[..., KvNode]) -> Callable[[int], Ranks]:
    def made(ranks: int) -> Ranks:
        epoch = next(_epochs)
        # A transport names its landing area by the epoch; ranks of one worker have areas of their own.
        nodes = [make(rank=rank, ranks=ranks, heads=HEADS, epoch=epoch) for rank in range(ranks)]
        return Ranks(nodes, epoch)

    return made


@pytest.mark.parametrize(("sending", "receiving"), [(2, 2), (2, 1), (1, 2), (4, 1), (1, 8), (8, 2), (2, 8)])
def test_every_head_arrives_where_it_belongs(worker: Callable[[int], Ranks], sending: int, receiving: int) -> None:
    sender, receiver = worker(sending), worker(receiving)
    for block in IDS:
        sender.write(block, f"block-{block}")
    handoff = new_handoff()
    receiver.open(handoff, sender)
    sender.send(handoff, end=2)  # the rest comes when it is computed
    receiver.receive(handoff)
    for node in sender.nodes:
        node.publish(handoff, IDS, 2)
        node.computed(handoff)
    for node in receiver.nodes:
        received = node.until("Received", handoff)
        assert (received.error, received.blocks) == ("", len(IDS))
        assert received.wire_bytes == len(IDS) * node.block_bytes
    for target, block in zip(TARGETS, IDS, strict=True):
        assert receiver.holds(target, f"block-{block}")
    for node in sender.nodes:
        assert node.until("Taken", handoff).error == ""
        node.watch(0.05)
        assert len(node.all_of("Taken", handoff)) == 1
        node.end(handoff)
    for node in (*sender.nodes, *receiver.nodes):
        assert node.census().handoffs == 0


@pytest.mark.parametrize(("sending", "receiving"), [(2, 1), (1, 2)])
def test_a_receiver_that_gives_up_has_given_up_all_parts(
    worker: Callable[[int], Ranks], sending: int, receiving: int
) -> None:
    sender, receiver = worker(sending), worker(receiving)
    handoff = new_handoff()
    receiver.open(handoff, sender)
    sender.send(handoff, end=2)
    receiver.receive(handoff)
    receiver.nodes[-1].cancel(handoff)
    assert receiver.nodes[-1].until("Received", handoff).error == "cancelled"
    for node in sender.nodes:
        assert node.until("Taken", handoff).error == "cancelled"
        node.end(handoff)  # which the worker side does: the other ranks of the receiver hear of it
    for node in receiver.nodes[:-1]:
        assert node.until("Received", handoff).error == "lease_ended"


def test_a_rank_of_the_sender_that_is_lost_ends_the_handoff(worker: Callable[[int], Ranks]) -> None:
    sender, receiver = worker(2), worker(1)
    handoff = new_handoff()
    receiver.open(handoff, sender)
    sender.send(handoff, end=2)
    receiver.receive(handoff)
    sender.nodes[1].close()
    assert receiver.nodes[0].until("Received", handoff, DEADLINE_S).error == "worker_gone"
    assert sender.nodes[0].until("Taken", handoff).error == "cancelled"  # its part alone is of no use


def test_parts_do_not_fit_each_others_digests(worker: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that reads its neighbour's part of the same blocks notices."""
    sender, receiver = worker(2), worker(2)
    monkeypatch.setattr(Inbound, "connected", _as_shard(1, Inbound.connected))
    handoff = new_handoff()
    receiver.open(handoff, sender)
    sender.send(handoff)
    for node in receiver.nodes:
        node.until("Started", handoff)
    receiver.nodes[0].receive(handoff, TARGETS)
    assert receiver.nodes[0].until("Received", handoff).error == "digest"


def _as_shard(shard: int, connected: Callable[..., None]) -> Callable[..., None]:
    def changed(self: Inbound, *arguments: object) -> None:
        self.shard = shard
        self.__post_init__()
        connected(self, *arguments)

    return changed


@pytest.mark.parametrize(("sending", "receiving"), [(3, 2), (2, 3)])
def test_sizes_of_which_none_divides_the_other_are_refused_by_name(
    worker: Callable[[int], Ranks], sending: int, receiving: int
) -> None:
    sender, receiver = worker(sending), worker(receiving)
    handoff = new_handoff()
    receiver.open(handoff, sender)
    received = receiver.nodes[0].until("Received", handoff)
    assert received.error == "layout"
    assert f"{receiving} and {sending} tensor-parallel ranks" in received.message
