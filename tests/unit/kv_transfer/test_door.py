"""Who comes to a transfer agent's port, and how far: strangers, impostors, workers that are not registered, crowds."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from kv_transfer import door, greeting, wire
from kv_transfer.transports.shm import ShmDirect
from slipstream.errors import TransferError
from tests.support.kv_node import KvNode, new_handoff
from tests.support.kv_stranger import Stranger, dial, identity, token

IDS, TARGETS = [9, 3, 4], [7, 20, 21]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PATIENCE_S", 0.05)
    monkeypatch.setattr(door, "GREETING_S", 0.5)


@pytest.fixture(params=["shm/direct"])
def way(request: pytest.FixtureRequest) -> str:
    """What is looked at here comes before any way is chosen."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def pair(make: Callable[..., KvNode]) -> tuple[KvNode, KvNode]:
    """A sender and a receiver under keys of their own; each knows the other, and a third worker."""
    known = ("prefill", "decode", "third")
    return make(identity="prefill", registered=known), make(identity="decode", registered=known)


def begin(sender: KvNode, handoff: str, receiver: str = "decode") -> None:
    sender.begin(handoff, receiver=receiver)
    sender.publish(handoff, IDS)
    sender.computed(handoff)


def outcome(receiver: KvNode, sender: KvNode, handoff: str, *, told: str = "", means: str = "prefill") -> str:
    """How it ends when nothing begins: the error's code. `told`: see `KvNode.open`; `means`: the sender's name."""
    receiver.open(handoff, sender.address, sender.epoch, means, told)
    return receiver.until("Received", handoff).error


def test_registered_workers_exchange_what_one_was_told_to_have(pair: tuple[KvNode, KvNode]) -> None:
    sender, receiver = pair
    handoff = new_handoff()
    begin(sender, handoff)
    receiver.open(handoff, sender.address, sender.epoch, "prefill")
    receiver.until("Started", handoff)
    receiver.receive(handoff, TARGETS)
    assert receiver.until("Received", handoff).error == ""
    assert receiver.holds(TARGETS[2], f"{sender.epoch}-{IDS[2]}")
    assert (sender.refused, receiver.refused) == ([], [])


def test_a_receiver_that_was_not_told_the_token_gets_nothing_and_the_right_one_still_does(
    pair: tuple[KvNode, KvNode],
) -> None:
    sender, receiver = pair
    handoff = new_handoff()
    begin(sender, handoff)
    assert outcome(receiver, sender, handoff, told=new_handoff()) == "bad_token"
    assert sender.refused == ["bad_token"]
    receiver.seen.clear()
    receiver.open(handoff, sender.address, sender.epoch, "prefill")
    receiver.until("Started", handoff)


def test_a_receiver_with_the_token_of_another_workers_handoff_gets_nothing(pair: tuple[KvNode, KvNode]) -> None:
    sender, receiver = pair
    handoff = new_handoff()
    begin(sender, handoff, receiver="third")
    assert outcome(receiver, sender, handoff) == "bad_token"
    assert sender.refused == ["bad_token"]


def test_a_sender_that_was_not_told_the_token_is_not_believed(
    pair: tuple[KvNode, KvNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the handoff's id, and lets anybody have it: as one would that wants another prompt's place taken."""
    sender, receiver = pair
    handoff = new_handoff()
    monkeypatch.setattr("kv_transfer.outbound.Receiver.check", lambda self, permit: None)
    monkeypatch.setattr("tests.support.kv_node.token", lambda handoff: bytes(32))
    begin(sender, handoff)
    monkeypatch.setattr("tests.support.kv_node.token", token)
    assert outcome(receiver, sender, handoff) == "bad_token"
    assert receiver.refused == ["bad_token"]


def test_a_worker_that_is_not_registered_is_not_let_in(make: Callable[..., KvNode]) -> None:
    sender = make(identity="prefill", registered=("prefill",))
    receiver = make(identity="decode", registered=("prefill", "decode"))
    assert outcome(receiver, sender, new_handoff()) == "not_registered"
    assert sender.refused == ["not_registered"]


def test_a_worker_asks_nobody_who_is_not_registered(make: Callable[..., KvNode]) -> None:
    sender = make(identity="prefill", registered=("prefill", "decode"))
    receiver = make(identity="decode", registered=("decode",))
    assert outcome(receiver, sender, new_handoff()) == "not_registered"
    assert (sender.refused, receiver.refused) == ([], ["not_registered"])


def test_another_worker_under_the_address_of_the_one_that_is_meant_is_found_out(pair: tuple[KvNode, KvNode]) -> None:
    sender, receiver = pair
    assert outcome(receiver, sender, new_handoff(), means="third") == "worker_gone"


def test_who_is_registered_is_said_by_the_workers_own_service_alone(pair: tuple[KvNode, KvNode]) -> None:
    sender, _ = pair
    said = wire.Registered([identity("somebody").public, identity("decode").public])
    with Stranger(sender.address, "decode", "prefill") as worker:
        worker.say(said)
        assert worker.hear() is None
    with pytest.raises(TransferError, match="no registered worker"):
        Stranger(sender.address, "somebody", "prefill")
    with Stranger(sender.address, "owner", "prefill") as service:
        service.say(said)
        assert service.hear() == wire.Noted()
    with Stranger(sender.address, "somebody", "prefill") as somebody:
        somebody.say(wire.Hello(wire.VERSION, 1, sender.epoch, "here", ["shm"], None))
        assert isinstance(somebody.hear(), wire.Hello)


def test_nobody_but_its_service_has_an_agent_connect_somewhere(pair: tuple[KvNode, KvNode]) -> None:
    sender, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as there, Stranger(sender.address, "decode", "prefill") as worker:
        there.settimeout(0.3)
        address = f"127.0.0.1:{there.getsockname()[1]}"
        worker.say(wire.ProbePeer(address, 1, identity("third").public, ""))
        assert worker.hear() is None
        with pytest.raises(TimeoutError):
            there.accept()


@pytest.fixture
def transferring(pair: tuple[KvNode, KvNode]) -> Iterator[KvNode]:
    """The sender of a handoff of which half has come, and whose other half must come whatever happens meanwhile."""
    sender, receiver = pair
    handoff = new_handoff()
    sender.begin(handoff, receiver="decode")
    sender.publish(handoff, IDS, 0, 1)
    receiver.open(handoff, sender.address, sender.epoch, "prefill")
    receiver.until("Started", handoff)
    receiver.receive(handoff, TARGETS)
    yield sender
    sender.publish(handoff, IDS, 1, 3)
    sender.computed(handoff)
    assert receiver.until("Received", handoff).error == ""


def ends(connection: socket.socket, seconds: float = 5.0) -> bool:
    """Whether the agent hangs up."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_strangers_who_say_nothing_or_little_have_a_moment_and_no_longer(transferring: KvNode) -> None:
    knock = wire.frame(greeting.encode(greeting.Knock(greeting.VERSION, identity("decode").public, b"s" * 32)))
    said = [b"", b"\0", struct.pack(">I", 100), knock[:40], knock]
    strangers = [dial(transferring.address) for _ in said]
    for stranger, text in zip(strangers, said, strict=True):
        stranger.sendall(text)
    for stranger in strangers:
        assert ends(stranger)
        stranger.close()
    assert transferring.refused.count("slow") >= 4


def test_a_crowd_of_strangers_has_a_limit_and_costs_nobody_else_his_place(
    transferring: KvNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_STRANGERS_OF_ADDRESS", 8)
    before = psutil.Process().memory_info().rss
    strangers = [dial(transferring.address) for _ in range(60)]
    for stranger in strangers:
        stranger.sendall(struct.pack(">I", greeting.MAX_GREETING_BYTES) + b"x" * 100)
    for stranger in strangers:
        assert ends(stranger)
        stranger.close()
    assert transferring.refused.count("crowded") >= 40
    assert psutil.Process().memory_info().rss - before < 16 << 20
    with Stranger(transferring.address, "third", "prefill") as worker:
        worker.say(wire.Hello(wire.VERSION, 1, transferring.epoch, "here", ["shm"], None))
        assert isinstance(worker.hear(), wire.Hello)


def test_a_registered_worker_has_a_limited_number_of_connections(
    transferring: KvNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_CONNECTIONS_OF_PEER", 3)
    others = []
    for _ in range(3):
        others.append(Stranger(transferring.address, "third", "prefill"))
        others[-1].say(wire.Hello(wire.VERSION, 1, transferring.epoch, "here", ["shm"], None))
        assert isinstance(others[-1].hear(), wire.Hello)  # so it is in
    with pytest.raises(TransferError, match="connections already"):
        Stranger(transferring.address, "third", "prefill")
    for other in others:
        other.close()


HOSTILE: dict[str, Callable[[Stranger], bytes]] = {
    "a huge frame": lambda _: struct.pack(">I", 2**31),
    "noise in a frame": lambda _: struct.pack(">I", 64) + b"n" * 64,
    "a message again": lambda worker: worker.sealed(wire.Noted()) * 2,
    "a message that is none": lambda worker: wire.frame(worker.session.sends.seal(b"\xc1")),
    "a negative number": lambda worker: wire.frame(
        worker.session.sends.seal(wire.encode(wire.Announce(bytes(16), -5, 1)))
    ),
    "a handoff without a name": lambda worker: worker.sealed(wire.Open(b"", bytes(32))),
    "out of place": lambda worker: worker.sealed(wire.Registered([])),
}


@pytest.mark.parametrize("said", HOSTILE)
def test_a_registered_worker_that_talks_nonsense_loses_its_connection_alone(transferring: KvNode, said: str) -> None:
    with Stranger(transferring.address, "third", "prefill") as worker:
        worker.say(wire.Hello(wire.VERSION, 1, transferring.epoch, "here", ["shm"], None))
        assert isinstance(worker.hear(), wire.Hello)
        worker.socket.sendall(HOSTILE[said](worker))
        assert ends(worker.socket)


def test_handoffs_that_nobody_knows_are_waited_for_in_a_limited_number(
    transferring: KvNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.exchange._MOST_PARKED", 4)
    transport = ShmDirect(readable=True)
    with Stranger(transferring.address, "third", "prefill") as worker:
        worker.say(wire.Hello(wire.VERSION, 1, transferring.epoch, "here", ["shm"], transferring.layout))
        assert isinstance(worker.hear(), wire.Hello)
        worker.say(wire.Link("shm/direct", transport.card(), "none"))
        linked = worker.hear()
        assert isinstance(linked, wire.Linked)
        assert linked.error == ""
        worker.say(*(wire.Open(number.to_bytes(16, "big"), bytes(32)) for number in range(6)))
        refused = [worker.hear(), worker.hear()]
        assert [one.code for one in refused if isinstance(one, wire.Closed)] == ["unknown_handoff"] * 2


def test_the_log_of_strangers_has_no_more_than_a_line_a_second(
    transferring: KvNode, capsys: pytest.CaptureFixture[str]
) -> None:
    began_s = time.monotonic()
    for _ in range(30):
        with dial(transferring.address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert ends(stranger)
    lines = capsys.readouterr().out.count("stranger_turned_away")
    assert 1 <= lines <= 2 + time.monotonic() - began_s
    assert transferring.refused.count("bad_message") == 30
