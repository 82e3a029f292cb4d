"""Workers that die, freeze or come back as another one; and strangers on the control port."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable

import msgspec
import pytest

from kv_transfer import greeting, wire
from slipstream.errors import StartupError
from tests.support.kv_node import KvNode, new_handoff
from tests.support.kv_peer import KvPeer
from tests.support.kv_stranger import Stranger, dial

IDS = [9, 3, 4, 5, 30, 0]
TARGETS = [7, 20, 21, 22, 1, 40]


def begin_to_receive(handoff: str, peer: KvPeer, ours: KvNode) -> None:
    """Half of the blocks are here, half are not computed."""
    peer.all([["begin", handoff], ["publish", handoff, IDS, 0, 3]])
    ours.open(handoff, peer.address, peer.epoch)
    ours.until("Started", handoff)
    ours.receive(handoff, TARGETS)
    while not ours.holds(TARGETS[2], f"{peer.epoch}-{IDS[2]}"):
        ours.watch(0.01)


def test_a_killed_sender_is_noticed_at_once_and_its_successor_is_another_one(
    start: Callable[..., KvPeer], ours: KvNode
) -> None:
    peer = start()
    handoff, waiting, late = new_handoff(), new_handoff(), new_handoff()
    begin_to_receive(handoff, peer, ours)
    ours.open(waiting, peer.address, peer.epoch)
    peer.kill()
    assert ours.until("Received", handoff).error == "worker_gone"
    assert ours.until("Received", waiting).error == "worker_gone"
    for block in TARGETS:
        ours.write(block, "new use")

    successor = start(port=int(peer.address.rpartition(":")[2]))
    successor.do("send", late, IDS)
    ours.open(late, peer.address, peer.epoch)
    received = ours.until("Received", late)
    assert received.error == "worker_gone"
    assert "restarted" in received.message
    again = new_handoff()
    successor.do("send", again, IDS)
    assert ours.fetch(again, successor.address, successor.epoch, [2, 3, 4, 5, 6, 8]).error == ""
    assert all(ours.holds(block, "new use") for block in TARGETS)


def test_a_frozen_sender_is_given_up_and_may_thaw_without_harm(
    start: Callable[..., KvPeer], make: Callable[..., KvNode]
) -> None:
    peer, ours = start(), make(silence_s=0.5)
    handoff, again = new_handoff(), new_handoff()
    begin_to_receive(handoff, peer, ours)
    os.kill(peer.pid, signal.SIGSTOP)
    received = ours.until("Received", handoff)
    assert received.error == "worker_gone"
    assert "transfer.silence_s = 0.5" in received.message
    for block in TARGETS:
        ours.write(block, "new use")
    os.kill(peer.pid, signal.SIGCONT)
    peer.all([["publish", handoff, IDS, 3, 6], ["send", again, IDS]])
    assert ours.fetch(again, peer.address, peer.epoch, [2, 3, 4, 5, 6, 8]).error == ""
    assert all(ours.holds(block, "new use") for block in TARGETS)


def test_what_a_killed_or_frozen_receiver_did_not_take_another_one_gets(
    start: Callable[..., KvPeer], make: Callable[..., KvNode], way: str
) -> None:
    ours, other = make(silence_s=0.5), make()
    killed, frozen = start(way=way), start(way=way)
    for receiver in (killed, frozen):
        handoff = new_handoff()
        ours.begin(handoff)
        ours.publish(handoff, IDS, 0, 3)
        receiver.do("open", handoff, ours.address, ours.epoch)
        receiver.until("Started", handoff)
        receiver.do("receive", handoff, TARGETS)
        if receiver is killed:
            receiver.kill()
        else:
            os.kill(receiver.pid, signal.SIGSTOP)
            ours.watch(0.8)
        assert ours.until("Taken", handoff).error == "worker_gone"
        ours.publish(handoff, IDS, 3, 6)
        assert other.fetch(handoff, ours.address, ours.epoch, TARGETS).error == ""
        assert other.holds(TARGETS[5], f"{ours.epoch}-{IDS[5]}")
        ours.watch(0.1)
        assert [taken.error for taken in ours.all_of("Taken", handoff)] == ["worker_gone", ""]
        if receiver is frozen:
            os.kill(receiver.pid, signal.SIGCONT)
            assert receiver.until("Received", handoff).error in ("worker_gone", "bad_handoff")


def test_a_sender_that_shuts_down_says_so(start: Callable[..., KvPeer], ours: KvNode) -> None:
    peer = start()
    handoff = new_handoff()
    begin_to_receive(handoff, peer, ours)
    peer.stop()
    assert ours.until("Received", handoff).error == "worker_gone"


def test_a_receiver_that_shuts_down_ends_what_it_waits_for(peer: KvPeer, ours: KvNode) -> None:
    half, waiting = new_handoff(), new_handoff()
    begin_to_receive(half, peer, ours)
    ours.open(waiting, peer.address, peer.epoch)
    ours.close()
    for handoff in (half, waiting):
        assert ours.until("Received", handoff).error in ("cancelled", "worker_gone")
    ours.close()
    ours.open(new_handoff(), peer.address, peer.epoch)  # too late, and no error
    peer.do("end", half)


def test_a_port_that_is_taken_is_named(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    port = int(peer.address.rpartition(":")[2])
    with pytest.raises(StartupError, match=rf"transfer\.port: cannot listen on 127\.0\.0\.1:{port}"):
        make(port=port)


def closed_within(stranger: socket.socket, seconds: float) -> bool:
    """Whether the other side closes the connection; what it still says does not matter."""
    until_s = time.monotonic() + seconds
    stranger.settimeout(seconds)
    try:
        while time.monotonic() < until_s:
            if not stranger.recv(1 << 16):
                return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


NONSENSE = {
    "noise": random.Random(3).randbytes(5000),
    "a web request": b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    "a huge frame": struct.pack(">I", 2**32 - 1) + b"x" * 100,
    "no message": struct.pack(">I", 3) + b"\xc1\xff\x00",
    "text that is not UTF-8": wire.frame(wire.encode(wire.Link("XX", b"", "none"))).replace(b"XX", b"\xff\xfe"),
    "deeply nested": struct.pack(">I", 100_000) + b"\x91" * 100_000,
    "a message out of place": wire.frame(wire.encode(wire.Credit(bytes(16), 5))),
    "a hello without a greeting": wire.frame(wire.encode(wire.Hello(wire.VERSION, 1, 1, "here", ["shm"], None))),
    "an old version": wire.frame(greeting.encode(greeting.Knock(1, bytes(32), bytes(32)))),
    "no key": wire.frame(greeting.encode(greeting.Knock(greeting.VERSION, b"", bytes(32)))),
    "an empty frame": struct.pack(">I", 0),
}


@pytest.mark.parametrize("said", NONSENSE)
def test_nonsense_on_the_control_port_is_answered_by_hanging_up(peer: KvPeer, said: str) -> None:
    with dial(peer.address) as stranger:
        stranger.sendall(NONSENSE[said])
        assert closed_within(stranger, 4.0)


def test_strangers_disturb_nobody(make: Callable[..., KvNode], peer: KvPeer) -> None:
    ours = make()
    handoff = new_handoff()
    begin_to_receive(handoff, peer, ours)
    strangers = []
    for said in NONSENSE.values():
        strangers.append(dial(peer.address))
        strangers[-1].sendall(said[: len(said) // 2] if len(strangers) % 2 else said)
    peer.all([["publish", handoff, IDS, 3, 6], ["computed", handoff]])
    assert ours.until("Received", handoff).error == ""
    for stranger in strangers:
        stranger.close()


def test_half_a_frame_holds_a_connection_only_for_the_silence(make: Callable[..., KvNode]) -> None:
    sender = make(silence_s=0.3)
    with Stranger(sender.address) as stranger:
        stranger.socket.sendall(struct.pack(">I", 1000) + b"x" * 10)
        assert closed_within(stranger.socket, 5.0)


@pytest.mark.parametrize(
    "message",
    [
        wire.Link("shm/direct", b"no card", "none"),
        wire.Link(
            "shm/staged", msgspec.msgpack.encode({"file": "../x-landing.kv", "places": 1, "place_bytes": 9}), "none"
        ),
        wire.Link(
            "shm/staged", msgspec.msgpack.encode({"file": "a-landing.kv", "places": -1, "place_bytes": 9}), "none"
        ),
        wire.Link("shm/staged", b"\x81\xa4file\xa2\xff\xfe", "none"),
        wire.Link("pigeon", b"", "none"),
    ],
    ids=["no card", "a file of its choice", "no size", "not UTF-8", "an unknown way"],
)
def test_a_card_that_makes_no_sense_is_refused_in_words(peer: KvPeer, message: wire.Link) -> None:
    with Stranger(peer.address) as stranger:
        stranger.say(wire.Hello(wire.VERSION, 1, peer.epoch, "here", ["shm"], None), message)
        kinds: list[wire.Message | None] = []
        while not kinds or not isinstance(kinds[-1], wire.Linked):
            kinds.append(stranger.hear())
            assert kinds[-1] is not None
        assert kinds[-1].error
