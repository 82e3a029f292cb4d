"""How handoffs end that are not simply taken: cancelled, expired, unknown, unfit; and what is left of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kv_transfer import wire
from kv_transfer.handoff import Handoff
from tests.support.kv_node import BLOCKS, DEADLINE_S, Census, KvNode, new_handoff
from tests.support.kv_peer import KvPeer
from tests.support.kv_stranger import identity

KEY, TOKEN = identity("node").public, bytes(32)
IDS = [9, 3, 4, 5, 30, 0]
TARGETS = [7, 20, 21, 22, 1, 40]


def bring(state: str, handoff: str, peer: KvPeer, ours: KvNode) -> None:
    """The handoff into a state in which it can be cancelled."""
    before = peer.census().handoffs
    ours.open(handoff, peer.address, peer.epoch)
    if state == "connecting":
        return
    if state == "open":
        until_s = time.monotonic() + DEADLINE_S
        while peer.census().handoffs == before:  # the other side has not heard of it yet
            assert time.monotonic() < until_s
            ours.watch(0.01)
        return
    peer.do("begin", handoff)
    ours.until("Started", handoff)
    if state == "started":
        return
    if state == "partly here":
        peer.do("publish", handoff, IDS, 0, 3)
    elif state == "all on its way":
        peer.post([["publish", handoff, IDS], ["computed", handoff]])
    ours.receive(handoff, TARGETS)
    if state == "partly here":
        while not ours.holds(TARGETS[2], f"{peer.epoch}-{IDS[2]}"):
            ours.watch(0.01)
    if state == "all on its way":
        peer.answers()


@pytest.mark.parametrize(
    "state", ["connecting", "open", "started", "nothing here yet", "partly here", "all on its way"]
)
def test_a_cancelled_handoff_ends_once_and_its_blocks_are_left_alone(peer: KvPeer, ours: KvNode, state: str) -> None:
    handoff = new_handoff()
    bring(state, handoff, peer, ours)
    ours.cancel(handoff)
    received = ours.until("Received", handoff)
    assert received.error == "cancelled" or (state == "all on its way" and received.error == "")
    for block in TARGETS:
        ours.write(block, "new use")
    ours.cancel(handoff)
    ours.receive(handoff, TARGETS)
    peer.all([["begin", handoff], ["publish", handoff, IDS], ["computed", handoff]])
    ours.watch(0.1)
    assert len(ours.all_of("Received", handoff)) == 1
    assert all(ours.holds(block, "new use") for block in TARGETS)
    peer.do("end", handoff)


def test_the_sender_hears_that_its_blocks_are_not_wanted(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    bring("partly here", handoff, peer, ours)
    ours.cancel(handoff)
    assert peer.until("Taken", handoff).error == "cancelled"


def test_cancelled_at_every_moment_the_blocks_have_one_owner(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    """Overwritten as soon as `Received` is there, blocks keep what was written, while the sender goes on."""
    ours = make(span_bytes=1024)
    for round_number in range(60):
        handoff = new_handoff()
        ours.open(handoff, peer.address, peer.epoch)
        peer.do("begin", handoff)
        ours.until("Started", handoff)
        ours.receive(handoff, TARGETS)
        peer.post([["publish", handoff, IDS, first, first + 1] for first in range(6)])
        if round_number % 3:
            ours.agent.news.wait(round_number * 0.0001)
        ours.cancel(handoff)
        ours.until("Received", handoff)
        for block in TARGETS:
            ours.write(block, "new use")
        peer.answers()
        peer.do("end", handoff)
        assert all(ours.holds(block, "new use") for block in TARGETS)
        ours.seen.clear()


@pytest.mark.parametrize("state", ["open", "started", "partly here"])
def test_a_lease_that_ends_is_told_to_who_waits(peer: KvPeer, ours: KvNode, state: str) -> None:
    handoff = new_handoff()
    bring(state, handoff, peer, ours)
    peer.do("end", handoff)
    received = ours.until("Received", handoff)
    assert (received.error, received.message) == ("lease_ended", "the lease on the blocks has ended")


def test_nothing_of_a_handoff_is_sent_after_its_end(peer: KvPeer, ours: KvNode) -> None:
    handoff = new_handoff()
    bring("started", handoff, peer, ours)
    peer.all([["end", handoff], ["publish", handoff, IDS], ["computed", handoff]])
    ours.receive(handoff, TARGETS)
    assert ours.until("Received", handoff).error == "lease_ended"
    assert all(ours.holds(block, f"{ours.epoch}-{block}") for block in TARGETS)


def test_a_handoff_that_nobody_computes_is_refused_after_a_while(make: Callable[..., KvNode]) -> None:
    sender, ours = make(parked_s=0.2), make()
    handoff = new_handoff()
    ours.open(handoff, sender.address, sender.epoch)
    assert ours.until("Received", handoff).error == "unknown_handoff"


def test_of_two_who_wait_for_a_handoff_the_later_one_has_it(make: Callable[..., KvNode]) -> None:
    sender, first, second = make(), make(), make()
    handoff = new_handoff()
    first.open(handoff, sender.address, sender.epoch)
    first.watch(0.1)
    second.open(handoff, sender.address, sender.epoch)
    second.watch(0.1)
    assert first.until("Received", handoff).error == "bad_handoff"
    sender.send(handoff, IDS)
    second.until("Started", handoff)
    second.receive(handoff, TARGETS)
    assert second.until("Received", handoff).error == ""


def test_who_takes_a_handoff_over_from_another_gets_all_of_it(make: Callable[..., KvNode]) -> None:
    sender, first, second = make(), make(), make()
    handoff = new_handoff()
    sender.begin(handoff)
    sender.publish(handoff, IDS, 0, 3)
    first.open(handoff, sender.address, sender.epoch)
    first.until("Started", handoff)
    first.receive(handoff, TARGETS)
    first.watch(0.1)
    second.open(handoff, sender.address, sender.epoch)
    second.until("Started", handoff)
    second.receive(handoff, TARGETS)
    sender.publish(handoff, IDS, 3, 6)
    given_up = first.until("Received", handoff)
    assert (given_up.error, given_up.message) == ("bad_handoff", "another worker has opened this handoff")
    assert second.until("Received", handoff).error == ""
    assert second.holds(TARGETS[5], f"{sender.epoch}-{IDS[5]}")


def test_who_comes_after_a_handoff_was_taken_is_told_when_its_lease_ends(make: Callable[..., KvNode]) -> None:
    sender, first, second = make(), make(), make()
    handoff = new_handoff()
    sender.send(handoff, IDS)
    assert first.fetch(handoff, sender.address, sender.epoch, TARGETS).error == ""
    sender.until("Taken", handoff)
    second.open(handoff, sender.address, sender.epoch)
    second.until("Started", handoff)
    sender.end(handoff)
    assert second.until("Received", handoff).error == "lease_ended"


def test_blocks_that_do_not_come_in_time_are_computed_here(make: Callable[..., KvNode]) -> None:
    sender, ours = make(), make(timeout_s=0.3)
    handoff = new_handoff()
    sender.begin(handoff)
    sender.publish(handoff, IDS, 0, 5)
    sender.computed(handoff)
    received = ours.fetch(handoff, sender.address, sender.epoch, TARGETS)
    assert received.error == "timeout"
    assert "transfer.timeout_s = 0.3" in received.message


def test_a_long_computation_is_no_timeout(make: Callable[..., KvNode]) -> None:
    """The deadline counts from the moment when all is computed, also when that is right before it would have ended."""
    sender, ours = make(), make(timeout_s=0.8)
    handoff = new_handoff()
    sender.begin(handoff)
    ours.open(handoff, sender.address, sender.epoch)
    ours.until("Started", handoff)
    ours.receive(handoff, TARGETS)
    ours.watch(1.5)
    sender.computed(handoff)
    ours.watch(0.2)
    assert ours.all_of("Received", handoff) == []
    sender.publish(handoff, IDS)
    assert ours.until("Received", handoff).error == ""


def test_another_layout_is_refused_before_a_byte_moves(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    ours = make(fingerprint="another model")
    handoff = new_handoff()
    peer.do("send", handoff, IDS)
    ours.open(handoff, peer.address, peer.epoch)
    received = ours.until("Received", handoff)
    assert (received.error, received.wire_bytes) == ("layout", 0)


def test_another_version_is_refused_and_the_remedy_named(
    peer: KvPeer, ours: KvNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    received = ours.until("Received", handoff)
    assert received.error == "bad_message"
    assert "one version on all" in received.message


def test_workers_of_two_hosts_do_not_try_shared_memory(peer: KvPeer, make: Callable[..., KvNode], way: str) -> None:
    if not way.startswith("shm/"):
        pytest.skip("this way goes between hosts")
    ours = make(host_id="there")
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    received = ours.until("Received", handoff)
    assert received.error == "no_path"
    assert "two hosts" in received.message


@pytest.mark.parametrize(
    "handoff",
    [
        Handoff(b"short", "127.0.0.1:1", 1, KEY, TOKEN),
        Handoff(bytes(16), "nowhere", 1, KEY, TOKEN),
        Handoff(bytes(16), "127.0.0.1:port", 1, KEY, TOKEN),
        Handoff(bytes(16), "127.0.0.1:99999", 1, KEY, TOKEN),
        Handoff(bytes(16), "127.0.0.1:1", 1, KEY, TOKEN),
        Handoff(bytes(16), "127.0.0.1:1", 1 << 64, KEY, TOKEN),
        Handoff(bytes(16), "127.0.0.1:1", -1, KEY, TOKEN),
    ],
    ids=str,
)
def test_a_handoff_that_leads_nowhere_ends_in_an_error(ours: KvNode, handoff: Handoff) -> None:
    ours.agent.open("request", handoff)
    assert ours.until("Received", "request").error in ("bad_handoff", "worker_gone")


def test_hundreds_of_handoffs_leave_nothing_behind(
    start: Callable[..., KvPeer], make: Callable[..., KvNode], tmp_path: Path
) -> None:
    peer = start(folder=str(tmp_path))
    ours = make(folder=str(tmp_path), places=4)

    def a_round() -> None:
        handoffs = [new_handoff() for _ in range(20)]
        for number, handoff in enumerate(handoffs):
            ours.open(handoff, peer.address, peer.epoch)
            if number % 5 == 0:  # never begun
                ours.cancel(handoff)
                continue
            peer.do("begin", handoff)
            ours.until("Started", handoff)
            ours.receive(handoff, [2 * number, 2 * number + 1])
            peer.do("publish", handoff, [number, BLOCKS - 1 - number], 0, 1)
            if number % 5 == 1:
                ours.cancel(handoff)
            elif number % 5 == 2:
                peer.do("end", handoff)
            else:
                peer.all([["publish", handoff, [number, BLOCKS - 1 - number], 1, 2], ["computed", handoff]])
        for handoff in handoffs:
            ours.until("Received", handoff)
        peer.all([["end", handoff] for handoff in handoffs])
        ours.seen.clear()

    def settled() -> tuple[list[Census], list[str]]:
        ours.watch(0.2)
        gc.collect()
        counted = [ours.census(), peer.census()]
        assert all(census.threads < 50 for census in counted)  # pools, which grow to their limit
        return [msgspec.structs.replace(census, threads=0) for census in counted], sorted(os.listdir(tmp_path))

    for _ in range(2):
        a_round()
    before = settled()
    assert [census.handoffs for census in before[0]] == [0, 0]
    for _ in range(10):
        a_round()
    assert settled() == before
    ours.close()
    peer.stop()
    assert os.listdir(tmp_path) == []
