"""Which road NIXL's backends really take; NIXL itself does not tell.

UCX: the libraries keep a tree of their objects ("VFS", made for their monitoring tool). The endpoints of an agent are
listed there by address, under the agent's name; `ucp_ep_query` then names their transports and devices. These are the
ones that UCX uses; which of them carries large writes is concluded from their kind.
libfabric: it lists the providers it has, and NIXL 1.5 takes the first of `_PROVIDERS` that is among them. So this
holds as long as NIXL decides in that way.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from kv_transfer.transports.ucx_lanes import lanes_of

_PROVIDERS = ("cxi", "efa", "tcp", "sockets")
_FI_VERSION_1_18 = 1 << 16 | 18

# Lanes of an endpoint that carry large writes only if there is no better one, the worst last.
_SLOW_LANES = ("posix", "sysv", "tcp", "self")


_ListName = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


def ucx_endpoints(agent: str) -> set[int]:
    """Addresses of the endpoints of the NIXL agent with this name; none where they cannot be found."""
    ucs = _loaded("libucs")
    names: list[str] = []
    if ucs is not None:
        worker = f"/ucp/context/{agent}/worker/{agent}:0"
        add = _ListName(lambda name, _: names.append(name.decode()))
        ucs.ucs_vfs_path_list_dir(worker.encode(), add, None)  # looking at the worker brings its list up to date
        ucs.ucs_vfs_path_list_dir(f"{worker}/ep".encode(), add, None)
    return {int(name, 16) for name in names if re.fullmatch("0x[0-9a-f]+", name)}


def ucx_lanes(endpoint: int) -> list[tuple[str, str]]:
    """(transport, device) of each lane of a UCX endpoint. To be called by the thread that uses the endpoint."""
    ucp = _loaded("libucp")
    return lanes_of(ucp, endpoint) if ucp is not None else []


def fastest(lanes: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The lane that large writes take."""
    return min(lanes, key=lambda lane: _SLOW_LANES.index(lane[0]) if lane[0] in _SLOW_LANES else -1, default=None)


def libfabric_provider() -> str:
    """The provider that NIXL takes from the loaded libfabric; empty where that cannot be found out."""
    fabric = _loaded("libfabric")
    if fabric is None:
        return ""
    fabric.fi_tostr.restype = ctypes.c_char_p
    fabric.fi_tostr.argtypes = (ctypes.c_void_p, ctypes.c_int)
    fabric.fi_freeinfo.argtypes = (ctypes.c_void_p,)
    first = ctypes.c_void_p()
    if fabric.fi_getinfo(_FI_VERSION_1_18, None, None, ctypes.c_uint64(0), None, ctypes.byref(first)) != 0:
        return ""
    names: set[str] = set()
    info = first.value
    while info:
        names.update(re.findall(r"prov_name: (\w+)", fabric.fi_tostr(info, 0).decode(errors="replace")))
        info = ctypes.c_void_p.from_address(info).value  # `next` is the first field
    fabric.fi_freeinfo(first)
    return next((name for name in _PROVIDERS if name in names), "")


def _loaded(name: str) -> ctypes.CDLL | None:
    """The library of this name that is in the process already. NIXL brings its own, under made-up file names."""
    maps = Path("/proc/self/maps").read_text()
    found = re.search(rf"(/\S*/{name}[-.]\S*)$", maps, re.MULTILINE)
    return ctypes.CDLL(found[1]) if found else None
