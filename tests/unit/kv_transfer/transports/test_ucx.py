"""What is particular to the ucx transport: the network it takes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kv_transfer.transports.base import Run
from kv_transfer.transports.ucx import UcxLink, UcxTransport
from kv_transfer.transports.ucx_devices import devices_of, slow_road
from slipstream.errors import TransferError
from tests.support.two_hosts import DEVICE, TwoHosts, why_not

SPAN_BYTES = 1 << 16


@pytest.fixture
def rdma_devices(tmp_path: Path) -> Path:
    """The system's list of RDMA devices on a host where one belongs to the interface `lo`."""
    (tmp_path / "mlx5_0" / "device" / "net" / "lo").mkdir(parents=True)
    (tmp_path / "mlx5_1" / "device" / "net" / "ib1").mkdir(parents=True)
    return tmp_path


@contextlib.asynccontextmanager
async def linked(first: UcxTransport, second: UcxTransport) -> AsyncIterator[tuple[UcxLink, UcxLink]]:
    async with contextlib.AsyncExitStack() as stack:
        for transport in (first, second):
            stack.push_async_callback(transport.close)
            await transport.open([])
        one, other = await asyncio.gather(first.connect(second.card()), second.connect(first.card()))
        yield one, other


def transport(
    *, span_bytes: int = SPAN_BYTES, host: str | None = None, rdma_devices: Path | None = None
) -> UcxTransport:
    return UcxTransport(
        span_bytes=span_bytes,
        landing_bytes=4 * SPAN_BYTES,
        host=host,
        rdma_devices=rdma_devices or Path("/nonexistent"),
    )


async def test_the_interface_is_found_by_its_address(rdma_devices: Path) -> None:
    assert await devices_of("127.0.0.1", Path("/nonexistent")) == ["lo"]
    assert await devices_of("localhost", Path("/nonexistent")) == ["lo"]


async def test_rdma_devices_come_along_those_of_the_interface_if_it_has_any(rdma_devices: Path) -> None:
    assert await devices_of("127.0.0.1", rdma_devices) == ["lo", "mlx5_0:1"]
    (rdma_devices / "mlx5_0" / "device" / "net" / "lo").rename(rdma_devices / "mlx5_0" / "device" / "net" / "ib0")
    assert await devices_of("127.0.0.1", rdma_devices) == ["lo", "mlx5_0:1", "mlx5_1:1"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_an_unspecified_address_leaves_the_choice_to_ucx(host: str, rdma_devices: Path) -> None:
    assert await devices_of(host, rdma_devices) == []


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(TransferError, match=r"192\.0\.2\.7") as caught:
        await transport(host="192.0.2.7").open([])
    assert caught.value.code == "transport_unavailable"


@pytest.mark.skipif(bool(why_not()), reason=f"two hosts cannot be made here: {why_not()}")
def test_an_interface_that_is_down_is_not_opened_but_may_be_later() -> None:
    program = f"""
import asyncio, subprocess
from kv_transfer.transports.ucx import UcxTransport
from slipstream.errors import TransferError
from tests.support.two_hosts import DEVICE, TwoHosts, why_not

async def opened():
    transport = UcxTransport(span_bytes=4096, landing_bytes=8192, host="10.77.0.1")
    try:
        await transport.open([])
    except TransferError as error:
        return error.code + " " + error.message
    finally:
        await transport.close()
    return "open"

print(asyncio.run(opened()))
subprocess.run(["ip", "link", "set", "{DEVICE}", "up"], check=True)
while "state UP" not in subprocess.run(["ip", "link"], capture_output=True, text=True).stdout.split("{DEVICE}")[1]:
    pass
print(asyncio.run(opened()))
"""
    with TwoHosts() as hosts:
        hosts.near.run("ip", "link", "set", DEVICE, "down")
        first, second = hosts.near.run(sys.executable, "-c", program).splitlines()
    assert first.startswith("transport_unavailable")
    assert f"{DEVICE}, which has transfer.host '10.77.0.1', is down" in first
    assert second == "open"


@pytest.mark.parametrize("lanes", [["rc_mlx5/mlx5_0:1"], ["tcp/eth0", "rc_mlx5/mlx5_0:1"], []])
def test_no_warning_where_rdma_is_used(lanes: list[str], rdma_devices: Path) -> None:
    assert slow_road(lanes, rdma_devices) == ""


def test_tcp_beside_an_rdma_device_is_a_warning_that_names_the_settings(rdma_devices: Path, tmp_path: Path) -> None:
    warning = slow_road(["tcp/eth0", "tcp/eth1"], rdma_devices)
    assert all(word in warning for word in ("mlx5_0", "nixl", "UCX_NET_DEVICES", "UCX_TLS"))
    assert slow_road(["tcp/eth0"], tmp_path / "none") == ""


async def test_a_link_says_what_ucx_picked(rdma_devices: Path) -> None:
    async with linked(transport(host="127.0.0.1"), transport(rdma_devices=rdma_devices)) as (one, other):
        assert str(one.way) == "ucx/tcp/lo"
        assert one.way.warning == ""
        assert "mlx5_0" in other.way.warning


async def test_the_users_own_choice_of_network_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "no-such-device")
    chosen = transport(host="127.0.0.1")
    with pytest.raises(TransferError) as caught:
        async with linked(chosen, transport()):
            pass
    assert caught.value.code == "transport_unavailable"


async def test_ucx_leaves_no_settings_behind_for_others() -> None:
    before = dict(os.environ)
    async with linked(transport(), transport()):
        assert dict(os.environ) == before


async def test_a_machine_without_ucxx_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx._lib.libucxx", None)
    with pytest.raises(TransferError, match=r"slipstream\[ucx\]") as caught:
        await transport().open([])
    assert caught.value.code == "transport_unavailable"


async def test_peers_with_different_spans_agree_on_the_smaller_one() -> None:
    async with linked(transport(), transport(span_bytes=SPAN_BYTES // 2)) as (one, other):
        assert one.span_bytes == other.span_bytes == SPAN_BYTES // 2


async def test_a_span_longer_than_any_place_is_dropped() -> None:
    memory = ctypes.create_string_buffer(b"x" * SPAN_BYTES)
    async with linked(transport(), transport(span_bytes=SPAN_BYTES // 2)) as (one, other):
        one.span_bytes = SPAN_BYTES  # a sender that does not keep to what was agreed
        ticket = await other.grant()
        await one.send(ticket, [Run(ctypes.addressof(memory), SPAN_BYTES)])
        await one.send(ticket, [Run(ctypes.addressof(memory), 100)])
        assert bytes(await other.receive(ticket, 100)) == b"x" * 100


async def test_a_span_of_another_length_than_announced_is_refused() -> None:
    memory = ctypes.create_string_buffer(b"x" * 100)
    async with linked(transport(), transport()) as (one, other):
        ticket = await other.grant()
        await one.send(ticket, [Run(ctypes.addressof(memory), 99)])
        with pytest.raises(TransferError) as caught:
            await other.receive(ticket, 100)
        assert caught.value.code == "bad_handoff"
