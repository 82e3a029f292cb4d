"""The two hosts of the tests are two hosts: what crosses the cable is slowed and cut, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.two_hosts import DEVICE, TwoHosts, sweep, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"two hosts cannot be made here: {why_not()}")

PORT = 5000
OWNER = """
import time
from tests.support.two_hosts import TwoHosts
hosts = TwoHosts().__enter__()
hosts.far.start(("sleep", "600"), __import__("pathlib").Path("/dev/null"), own_memory=True)
print(hosts.near.name, flush=True)
time.sleep(600)
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as made:
        yield made


def greet(address: str, timeout_s: float) -> bytes:
    """What a server there says; empty when nothing came in time."""
    try:
        with socket.create_connection((address, PORT), timeout=timeout_s) as connection:
            return connection.recv(100)
    except TimeoutError:
        return b""


def serve(hosts: TwoHosts, folder: Path) -> None:
    """A server on the far host that greets whoever comes."""
    program = (
        "import socket\n"
        f"server = socket.create_server(('{hosts.far.address}', {PORT}))\n"
        "print('listening', flush=True)\n"
        "while True: server.accept()[0].sendall(b'hello')\n"
    )
    hosts.far.start((sys.executable, "-c", program), folder / "server.log")
    until = time.monotonic() + 20
    while "listening" not in (folder / "server.log").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_is_cut_does_not_come_and_comes_again_when_restored(hosts: TwoHosts, tmp_path: Path) -> None:
    serve(hosts, tmp_path)
    address = hosts.far.address
    assert hosts.near.call(greet, address, 10.0) == b"hello"
    hosts.cut()
    assert hosts.near.call(greet, address, 1.0) == b""
    hosts.restore()
    assert hosts.near.call(greet, address, 10.0) == b"hello"


def test_a_host_has_nothing_but_its_end_of_the_cable(hosts: TwoHosts) -> None:
    for host in (hosts.near, hosts.far):
        devices = {line.split(":")[1].split("@")[0].strip() for line in host.run("ip", "-o", "link").splitlines()}
        assert {"lo", DEVICE} <= devices
        assert not devices & {name for _, name in socket.if_nameindex()} - {"lo"}


def test_the_queue_before_the_cable_limits_the_rate(hosts: TwoHosts) -> None:
    said = hosts.slow(mbit=8)
    assert "8mbit" in said
    assert "8Mbit" in hosts.far.run("tc", "qdisc", "show", "dev", DEVICE)
    hosts.restore()
    assert "8Mbit" not in hosts.far.run("tc", "qdisc", "show", "dev", DEVICE)


def test_what_a_killed_owner_left_is_swept_away_and_what_others_use_stays(hosts: TwoHosts) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert name in names()
        owner.send_signal(signal.SIGKILL)
        owner.wait(timeout=10)
    sweep()
    assert name not in names()
    assert name.replace("-near", "-far") not in names()
    assert hosts.near.name in names()


def names() -> set[str]:
    return set(os.listdir("/run/netns"))
