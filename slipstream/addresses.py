"""host:port as gRPC and URLs want it: IPv6 addresses in brackets."""

from __future__ import annotations

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def host_port(host: str, port: int | str) -> str:
    """`127.0.0.1:8000`, `[::1]:8000`."""
    return f"{bracketed(host)}:{port}"


def bracketed(host: str) -> str:
    """An IPv6 address in brackets, everything else as it is."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def reachable(host: str) -> str:
    """The address under which this machine reaches what listens on `host`."""
    return _EVERYWHERE.get(host, host)
