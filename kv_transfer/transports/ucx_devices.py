"""Which network devices belong to an address, and whether a link takes a slower one than it could."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from slipstream.errors import TransferError

RDMA_DEVICES = Path("/sys/class/infiniband")
"""Where the kernel lists InfiniBand, RoCE and EFA devices."""


async def devices_of(host: str, rdma_devices: Path) -> list[str]:
    """UCX's names of the devices behind an address of this machine; none for an unspecified address.

    RDMA devices come along (`eth2`, `mlx5_0:1`): those that the interface belongs to, else all. An address on a host's
    control network says which TCP to use, not that its fabric shall lie idle.

    Raises:
        TransferError: `transport_unavailable`: the address is not one of this machine, or its interface is down. UCX
            would never look at an interface again that was down when it started.
    """
    address = await _resolve(host)
    if address.is_unspecified:
        return []
    interface = interface_of(str(address))
    if interface is None:
        raise TransferError(
            f"transfer.host {host!r} is no address of a network interface of this machine", code="transport_unavailable"
        )
    check_is_up(interface, host)
    return [interface, *(f"{device}:1" for device in _rdma_of(interface, rdma_devices))]


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has this address; None for a name, too."""
    wanted = _parsed(address)
    if wanted is None:
        return None
    for interface, addresses in psutil.net_if_addrs().items():
        if any(_parsed(found.address) == wanted for found in addresses):
            return interface
    return None


def check_is_up(interface: str, host: str) -> None:
    """Raises:
    TransferError: `transport_unavailable`: the network interface is down; later it may be up.
    """
    state = psutil.net_if_stats().get(interface)
    if state is not None and not state.isup:
        raise TransferError(
            f"the network interface {interface}, which has transfer.host {host!r}, is down",
            code="transport_unavailable",
        )


def slow_road(lanes: Sequence[str], rdma_devices: Path) -> str:
    """A warning if all lanes (`transport/device`) are TCP although there is an RDMA device; else empty."""
    devices = sorted(device.name for device in rdma_devices.iterdir()) if rdma_devices.is_dir() else []
    if not devices or not lanes or any(not lane.startswith("tcp/") for lane in lanes):
        return ""
    return (
        f"TCP although this machine has the RDMA device {devices[0]}: take transfer.transport = nixl, which brings a "
        "UCX with RDMA. The one that is installed with ucxx has none; one of the system has, with "
        f"RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true, UCX_NET_DEVICES (for example {devices[0]}:1) and without a "
        "UCX_TLS that leaves out rc and ud"
    )


async def _resolve(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransferError(
            f"transfer.host {host!r} cannot be resolved: {error}", code="transport_unavailable"
        ) from error
    return ipaddress.ip_address(found[0][4][0])


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None  # a name, or a hardware address


def _rdma_of(interface: str, rdma_devices: Path) -> list[str]:
    devices = sorted(rdma_devices.iterdir()) if rdma_devices.is_dir() else []
    own = [device for device in devices if (device / "device" / "net" / interface).exists()]
    return [device.name for device in own or devices]
