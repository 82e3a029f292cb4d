"""A process loads one UCX only.

ucxx and NIXL each bring their own build of it, and the two in one process crash it, sooner or later. Which of them a
worker needs follows from its peers and settings, so the first one stays.
"""

from __future__ import annotations

from slipstream.errors import TransferError

_loaded = ""


def claim(name: str) -> None:
    """Load this one (`ucx` or `nixl`) from now on.

    Raises:
        TransferError: `transport_unavailable`: the other one has been loaded.
    """
    global _loaded
    if _loaded not in ("", name):
        raise TransferError(
            f"this process has used {_loaded}, and {name} brings another build of UCX, which it cannot load beside: "
            "name the same transfer.transport on all workers",
            code="transport_unavailable",
        )
    _loaded = name
