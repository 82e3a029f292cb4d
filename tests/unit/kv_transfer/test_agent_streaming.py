"""Handoffs between two agents in two processes: what comes when, and where it goes."""

from __future__ import annotations

import base64
from collections.abc import Callable

from tests.support.kv_node import BLOCKS, REGIONS, KvNode, new_handoff
from tests.support.kv_peer import KvPeer

IDS = [9, 3, 4, 5, 30, 0]
TARGETS = [7, 20, 21, 22, 1, 40]


def seed(peer: KvPeer, block: int) -> str:
    """With which the peer's blocks were written in the beginning."""
    return f"{peer.epoch}-{block}"


def test_blocks_arrive_byte_for_byte_and_nothing_else_is_touched(peer: KvPeer, ours: KvNode, way: str) -> None:
    handoff = new_handoff()
    peer.do("send", handoff, IDS)
    received = ours.fetch(handoff, peer.address, peer.epoch, TARGETS)
    assert (received.error, received.blocks, received.again) == ("", 6, 0)
    assert received.wire_bytes == 6 * ours.block_bytes
    assert received.way.startswith(way)
    assert all(ours.holds(target, seed(peer, block)) for target, block in zip(TARGETS, IDS, strict=True))
    assert all(ours.holds(block, f"{ours.epoch}-{block}") for block in set(range(BLOCKS)) - set(TARGETS))
    assert peer.until("Taken", handoff).error == ""


def test_who_waits_is_told_of_the_prompt_when_its_computation_begins(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    ours.watch(0.1)
    assert ours.all_of("Started", handoff) == []
    peer.do("begin", handoff, 1234, 2**64 - 1)
    started = ours.until("Started", handoff)
    assert (started.tokens, started.digest) == (1234, 2**64 - 1)


def test_the_first_chunk_arrives_while_the_second_is_not_computed(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    peer.all([["begin", handoff], ["publish", handoff, IDS, 0, 2]])
    ours.open(handoff, peer.address, peer.epoch)
    ours.until("Started", handoff)
    ours.receive(handoff, TARGETS)
    while not ours.holds(TARGETS[1], seed(peer, IDS[1])):
        ours.watch(0.01)
    ours.watch(0.1)
    assert ours.all_of("Received", handoff) == []
    assert ours.holds(TARGETS[2], f"{ours.epoch}-{TARGETS[2]}")
    peer.do("publish", handoff, IDS, 2, 6)
    assert ours.until("Received", handoff).error == ""
    assert ours.holds(TARGETS[5], seed(peer, IDS[5]))


def test_layers_arrive_one_after_the_other(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    peer.do("begin", handoff)
    ours.until("Started", handoff)
    ours.receive(handoff, TARGETS)
    theirs = peer.do("read", IDS[5])
    for region in range(REGIONS):
        assert ours.all_of("Received", handoff) == []
        peer.do("publish", handoff, IDS, 0, 6, region, region + 1)
        while base64.b64encode(ours.read(TARGETS[5])[region]).decode() != theirs[region]:
            ours.watch(0.01)
    assert ours.until("Received", handoff).error == ""
    assert all(ours.holds(target, seed(peer, block)) for target, block in zip(TARGETS, IDS, strict=True))


def test_what_was_computed_before_anybody_announced_is_sent_then(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    peer.do("send", handoff, IDS)
    ours.until("Started", handoff)
    ours.watch(0.1)
    ours.receive(handoff, TARGETS)
    assert ours.until("Received", handoff).error == ""


def test_blocks_that_the_receiver_has_are_not_sent(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    peer.do("send", handoff, IDS)
    received = ours.fetch(handoff, peer.address, peer.epoch, TARGETS[4:], first=4)
    assert (received.error, received.blocks, received.wire_bytes) == ("", 2, 2 * ours.block_bytes)
    assert ours.holds(TARGETS[4], seed(peer, IDS[4]))
    assert ours.holds(TARGETS[3], f"{ours.epoch}-{TARGETS[3]}")


def test_a_receiver_that_wants_a_part_has_it_before_the_prompt_is_complete(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    peer.all([["begin", handoff], ["publish", handoff, IDS, 0, 4]])
    assert ours.fetch(handoff, peer.address, peer.epoch, TARGETS[1:3], first=1).error == ""
    assert ours.holds(TARGETS[2], seed(peer, IDS[2]))


def test_a_prompt_without_blocks_to_bring_is_taken_at_once(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    peer.do("begin", handoff)
    received = ours.fetch(handoff, peer.address, peer.epoch, [], first=6)
    assert (received.error, received.wire_bytes) == ("", 0)
    assert peer.until("Taken", handoff).error == ""


def test_a_handoff_that_does_not_move_does_not_hold_up_another(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    ours = make(places=4)
    slow, quick = new_handoff(), new_handoff()
    peer.do("begin", slow)
    ours.open(slow, peer.address, peer.epoch)
    ours.until("Started", slow)
    ours.receive(slow, TARGETS)
    peer.do("send", quick, [10, 11, 12])
    assert ours.fetch(quick, peer.address, peer.epoch, [10, 11, 12]).error == ""
    assert ours.all_of("Received", slow) == []
    peer.all([["publish", slow, IDS], ["computed", slow]])
    assert ours.until("Received", slow).error == ""


def test_many_handoffs_at_once_share_few_landing_places(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    ours = make(places=2)
    wanted = {new_handoff(): block for block in range(24)}
    for handoff, block in wanted.items():
        ours.open(handoff, peer.address, peer.epoch)
        peer.do("send", handoff, [block, 47 - block])
    for handoff, block in wanted.items():
        ours.until("Started", handoff)
        ours.receive(handoff, [2 * block, 2 * block + 1])
    assert [ours.until("Received", handoff).error for handoff in wanted] == [""] * len(wanted)
    for block in wanted.values():
        assert ours.holds(2 * block, seed(peer, block))
        assert ours.holds(2 * block + 1, seed(peer, 47 - block))


def test_workers_whose_landing_places_have_different_sizes(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    for span_bytes in (1024, 1 << 16):  # the smallest that a piece fits into; one in which everything fits
        ours = make(span_bytes=span_bytes)
        handoff = new_handoff()
        peer.do("send", handoff, IDS)
        assert ours.fetch(handoff, peer.address, peer.epoch, TARGETS).error == ""
        assert ours.holds(TARGETS[5], seed(peer, IDS[5]))


def test_a_prompt_computed_anew_after_a_preemption_arrives_from_its_new_blocks(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    peer.all([["begin", handoff], ["publish", handoff, IDS, 0, 2]])
    ours.open(handoff, peer.address, peer.epoch)
    ours.until("Started", handoff)
    ours.receive(handoff, TARGETS)
    other = [12, 13, 14, 15, 16, 17]
    peer.all([["reset", handoff], ["send", handoff, other]])
    assert ours.until("Received", handoff).error == ""
    assert all(ours.holds(target, seed(peer, block)) for target, block in zip(TARGETS[2:], other[2:], strict=True))
    assert len(ours.all_of("Started", handoff)) == 1


def test_several_receivers_take_from_one_sender_at_once(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    nodes = [make() for _ in range(3)]
    handoffs = [new_handoff() for _ in nodes]
    for node, handoff in zip(nodes, handoffs, strict=True):
        node.open(handoff, peer.address, peer.epoch)
    for handoff in handoffs:
        peer.do("send", handoff, IDS)
    for node, handoff in zip(nodes, handoffs, strict=True):
        node.until("Started", handoff)
        node.receive(handoff, TARGETS)
    for node, handoff in zip(nodes, handoffs, strict=True):
        assert node.until("Received", handoff).error == ""
        assert node.holds(TARGETS[3], seed(peer, IDS[3]))


def test_two_nodes_send_to_each_other_at_the_same_time(
    start: Callable[..., KvPeer], make: Callable[..., KvNode]
) -> None:
    ours, peer = make(), start()
    out, back = new_handoff(), new_handoff()
    ours.send(out, IDS)
    peer.do("send", back, IDS)
    peer.do("open", out, ours.address, ours.epoch)
    ours.open(back, peer.address, peer.epoch)
    peer.until("Started", out)
    ours.until("Started", back)
    peer.do("receive", out, TARGETS)
    ours.receive(back, TARGETS)
    assert peer.until("Received", out).error == ""
    assert ours.until("Received", back).error == ""
    assert peer.do("holds", TARGETS[0], f"{ours.epoch}-{IDS[0]}")
    assert ours.holds(TARGETS[0], seed(peer, IDS[0]))
