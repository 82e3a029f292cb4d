"""Ports for servers that are started a moment after their port was chosen.

A port that the kernel chooses (`bind` to 0) lies in the range from which it takes ports for outgoing connections too:
once the probe is closed, any connection of this machine may get it before the server does. These are taken from below
that range, at a place by chance, so that two who choose at the same time rarely choose the same.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 10240
"""Below it live services with known ports."""
_LEAST_RANGE = 1000
_TRIES = 2000
_CHANCE = random.SystemRandom()
"""Not the common one: processes that were given the same seed would choose the same ports."""


def free_ports(count: int, host: str = "127.0.0.1", *, chosen: Collection[int] = ()) -> list[int]:
    """Ports of `host`, all different, on which nothing listens.

    Args:
        chosen: earlier, by servers that may not have taken them yet.

    Raises:
        OSError: none is free, or this machine does not have this host.
    """
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = _free_port(host, held)
            if port not in chosen:
                found.append(port)
    return found


def free_port(host: str = "127.0.0.1", *, chosen: Collection[int] = ()) -> int:
    """One of `free_ports`."""
    return free_ports(1, host, chosen=chosen)[0]


def _free_port(host: str, held: ExitStack) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    first, last = _FIRST, _first_ephemeral() - 1
    for attempt in range(_TRIES):
        probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
        # Where the kernel's own range leaves too few below it, and in the end, it is the kernel that chooses.
        own = last - first >= _LEAST_RANGE and attempt < _TRIES - 1
        try:
            probe.bind((host, _CHANCE.randint(first, last) if own else 0))
            probe.listen(1)
        except OSError:
            probe.close()
            if not own:
                raise
            continue
        port: int = probe.getsockname()[1]
        return port
    raise AssertionError("the last try returns or raises")


def _first_ephemeral() -> int:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768  # what Linux has unless told otherwise
