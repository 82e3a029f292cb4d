"""What only the nixl transport has: the road it takes and what it says of that, and links that share a peer.

Both ends are in this process, each with an agent of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kv_transfer.transports.base import Run
from kv_transfer.transports.nixl import NixlLink, NixlTransport
from slipstream.errors import TransferError

SPAN_BYTES = 1 << 20
CONTENT = ctypes.create_string_buffer(bytes(range(256)) * 4096)
MEMORY = Run(ctypes.addressof(CONTENT), SPAN_BYTES)


@pytest.fixture
def rdma(tmp_path: Path) -> Path:
    """Where the kernel of a machine with an RDMA device lists it."""
    (tmp_path / "mlx5_0").mkdir()
    return tmp_path


@asynccontextmanager
async def opened(infiniband: Path, *, host: str | None = None) -> AsyncIterator[NixlTransport]:
    transport = NixlTransport(
        backend="UCX", span_bytes=SPAN_BYTES, landing_bytes=2 * SPAN_BYTES, host=host, infiniband=infiniband
    )
    await transport.open([MEMORY])
    try:
        yield transport
    finally:
        await transport.close()


@asynccontextmanager
async def linked(infiniband: Path, *, host: str | None = None) -> AsyncIterator[tuple[NixlLink, NixlLink]]:
    async with opened(infiniband, host=host) as one, opened(infiniband, host=host) as other:
        yield await one.connect(other.card()), await other.connect(one.card())


async def carry(sender: NixlLink, receiver: NixlLink) -> None:
    ticket = await receiver.grant()
    await sender.send(ticket, [MEMORY])
    assert bytes(await receiver.receive(ticket, SPAN_BYTES)) == CONTENT.raw[:SPAN_BYTES]
    receiver.release(ticket)


async def test_tcp_is_named_with_its_interface_and_moves_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with linked(tmp_path, host="127.0.0.1") as (one, other):
        assert str(one.way) == "nixl/UCX:tcp/lo"
        assert one.way.warning == ""
        await carry(one, other)
        await carry(other, one)


async def test_tcp_on_a_machine_with_an_rdma_device_is_a_warning_with_a_remedy(
    rdma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with linked(rdma) as (link, _):
        assert link.way.detail.startswith("UCX:tcp/")
        assert "mlx5_0" in link.way.warning
        assert "UCX_TLS and UCX_NET_DEVICES" in link.way.warning


async def test_memory_of_one_host_is_no_reason_to_warn(rdma: Path) -> None:
    async with linked(rdma) as (link, _):
        assert not link.way.detail.startswith("UCX:tcp/")
        assert link.way.warning == ""


async def test_two_links_to_one_peer_work_beside_each_other_and_end_one_by_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        out, back = await one.connect(other.card()), await one.connect(other.card())
        there, again = await other.connect(one.card()), await other.connect(one.card())
        await carry(out, there)
        await carry(again, back)
        await out.close()
        await there.close()
        await carry(again, back)


async def test_a_ticket_serves_only_the_link_that_gave_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        here, neighbour = await one.connect(other.card()), await one.connect(other.card())
        ticket = await here.grant()
        with pytest.raises(TransferError, match="was granted"):
            await neighbour.receive(ticket, 1)
        neighbour.release(ticket)
        await carry(await other.connect(one.card()), neighbour)
        here.release(ticket)


async def test_what_was_never_registered_is_not_sent(tmp_path: Path) -> None:
    foreign = ctypes.create_string_buffer(100)
    async with linked(tmp_path) as (one, other):
        with pytest.raises(TransferError):
            await one.send(await other.grant(), [Run(ctypes.addressof(foreign), 100)])


async def test_peers_with_another_backend_are_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as one:
        other = NixlTransport(backend="LIBFABRIC", span_bytes=SPAN_BYTES, landing_bytes=SPAN_BYTES, host=None)
        with pytest.raises(TransferError, match="nixl_backend is LIBFABRIC here and UCX there"):
            await other.connect(one.card())


async def test_a_backend_that_does_not_start_is_told_with_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    transport = NixlTransport(backend="UCX", span_bytes=SPAN_BYTES, landing_bytes=SPAN_BYTES, host=None)
    with pytest.raises(TransferError, match=r"no working UCX backend here.*UCX_TLS") as caught:
        await transport.open([])
    await transport.close()
    assert caught.value.code == "transport_unavailable"
