"""Which way two agents agree on in the end, and how fast they find it to be."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kv_transfer import wire
from kv_transfer.door import dialed
from kv_transfer.transports.shm import ShmDirect
from slipstream.errors import TransferError
from tests.support.kv_node import KvNode, Options, new_handoff
from tests.support.kv_peer import KvPeer
from tests.support.kv_stranger import identity


@pytest.fixture
def either(tmp_path: Path) -> Iterator[KvNode]:
    """A receiver that takes whatever way works, `shm/direct` first."""
    node = KvNode(Options(str(tmp_path), 5, way="shm"))
    yield node
    node.close()


def arrives_by(ours: KvNode, peer: KvPeer) -> str:
    handoff = new_handoff()
    peer.do("send", handoff, [1, 2, 3])
    received = ours.fetch(handoff, peer.address, peer.epoch, [4, 5, 6])
    assert received.error == ""
    assert ours.holds(6, f"{peer.epoch}-3")
    return received.way


def test_memory_is_read_directly_where_the_kernel_allows_it(
    either: KvNode, start: Callable[..., KvPeer], tmp_path: Path
) -> None:
    assert arrives_by(either, start(folder=str(tmp_path))) == "shm/direct"


def test_it_is_staged_where_the_kernel_forbids_reading(start: Callable[..., KvPeer], tmp_path: Path) -> None:
    sender = start(folder=str(tmp_path))
    forbidden = start(sys.executable, "-m", "tests.support.forbid_memory_reads", folder=str(tmp_path), way="shm")
    handoff = new_handoff()
    sender.do("send", handoff, [1, 2, 3])
    forbidden.do("open", handoff, sender.address, sender.epoch)
    forbidden.until("Started", handoff)
    forbidden.do("receive", handoff, [4, 5, 6])
    received = forbidden.until("Received", handoff)
    assert (received.error, received.way) == ("", "shm/staged")
    assert forbidden.do("holds", 6, f"{sender.epoch}-3")


def test_a_landing_area_that_the_sender_cannot_see_is_no_way(
    peer: KvPeer, make: Callable[..., KvNode], tmp_path: Path, way: str
) -> None:
    if way != "shm/staged":
        pytest.skip("only this way needs a folder that both can see")
    ours = make(folder=str(tmp_path))
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    received = ours.until("Received", handoff)
    assert received.error == "no_path"
    assert "cannot be mapped" in received.message


def test_a_landing_area_that_finds_no_room_is_no_way(make: Callable[..., KvNode], peer: KvPeer, way: str) -> None:
    if way != "shm/staged":
        pytest.skip("only this way needs room")
    ours = make(places=1 << 40)
    handoff = new_handoff()
    ours.open(handoff, peer.address, peer.epoch)
    received = ours.until("Received", handoff)
    assert received.error == "no_path"
    assert "transfer.landing_bytes" in received.message


async def test_memory_on_a_gpu_is_not_read_directly() -> None:
    with pytest.raises(TransferError) as caught:
        await ShmDirect(readable=False).open([])
    assert caught.value.code == "transport_unavailable"


async def test_another_process_under_the_same_number_is_not_taken_for_the_sender() -> None:
    """As when the two workers are in different PID namespaces."""
    ours = ShmDirect(readable=True)
    await ours.open([])
    card = msgspec.msgpack.decode(ours.card())
    await ours.connect(msgspec.msgpack.encode(card))
    with pytest.raises(TransferError, match="PID namespace") as caught:
        await ours.connect(msgspec.msgpack.encode({**card, "token": card["token"] ^ 1}))
    assert caught.value.code == "transport_unavailable"


async def probed(ours: KvNode, ask: wire.ProbePeer) -> wire.ProbeResult:
    owner, key = identity("owner"), identity("node").public
    async with dialed(owner, ours.address, key, 5.0, 10.0) as line, asyncio.timeout(30.0):
        line.post(ask)
        result = await line.next()
        assert isinstance(result, wire.ProbeResult)
        return result


@pytest.mark.parametrize("named", [False, True], ids=["over the handoffs' link", "over a link of its own"])
async def test_a_way_is_measured_while_blocks_travel(peer: KvPeer, ours: KvNode, way: str, named: bool) -> None:
    handoff = new_handoff()
    peer.do("begin", handoff)
    ours.open(handoff, peer.address, peer.epoch)
    transport = way.partition("/")[0] if named else ""
    result = await probed(ours, wire.ProbePeer(peer.address, peer.epoch, identity("node").public, transport))
    assert (result.error, f"{result.transport}/{result.detail}".startswith(way)) == ("", True)
    assert result.bytes_per_s > 0
    assert result.latency_s > 0
    peer.all([["publish", handoff, [1, 2]], ["computed", handoff]])
    ours.until("Started", handoff)
    ours.receive(handoff, [3, 4])
    assert ours.until("Received", handoff).error == ""


async def test_a_probe_of_a_worker_that_is_not_there_says_so(ours: KvNode) -> None:
    result = await probed(ours, wire.ProbePeer("127.0.0.1:1", 5, identity("node").public, ""))
    assert "no transfer agent at 127.0.0.1:1" in result.error
