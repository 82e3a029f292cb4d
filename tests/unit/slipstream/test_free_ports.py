from __future__ import annotations

import socket
from pathlib import Path

import pytest

from slipstream.free_ports import free_port, free_ports


def test_ports_differ_can_be_listened_on_and_no_outgoing_connection_gets_them() -> None:
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = free_ports(50)
    assert len(set(found)) == 50
    assert all(port < first_ephemeral for port in found)
    with socket.socket() as server:
        server.bind(("127.0.0.1", found[0]))


def test_where_the_kernels_range_leaves_no_room_the_kernel_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr("slipstream.free_ports._EPHEMERAL", everything)
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_a_host_that_is_not_this_machines_is_an_error() -> None:
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")
