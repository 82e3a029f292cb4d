"""Addresses as gRPC and URLs want them, and a control plane on an IPv6 one."""

from __future__ import annotations

import socket

import grpc.aio
import pytest

from planner.server import open_control_plane
from slipstream.addresses import host_port, reachable
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.registry_pb2 import WatchRequest, WorkerSet
from slipstream.v1.registry_pb2_grpc import RegistryStub


@pytest.mark.parametrize(
    ("host", "joined"), [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("[::1]", "[::1]:80"), ("a.b", "a.b:80")]
)
def test_an_ipv6_address_is_put_in_brackets(host: str, joined: str) -> None:
    assert host_port(host, 80) == joined


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("10.0.0.7", "10.0.0.7")])
def test_what_listens_everywhere_is_reached_on_this_machine(host: str, reached: str) -> None:
    assert reachable(host) == reached


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_a_control_plane_listens_on_an_ipv6_address() -> None:
    async with open_control_plane(ControlPlaneSettings(host="::1", port=0)) as plane:
        assert plane.address.startswith("[::1]:")
        async with grpc.aio.insecure_channel(plane.address) as channel:
            assert isinstance(await RegistryStub(channel).Watch(WatchRequest(), timeout=10).read(), WorkerSet)
