"""UCX itself: loading the `ucxx` package, and through ctypes the three calls which that package does not pass on.

ucxx is imported when a worker opens the `ucx` transport, not before: an installation without it has everything else.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from typing import Any

from kv_transfer.transports.ucx_lanes import lanes_of
from slipstream.errors import TransferError

_UCS_OK = 0
_FIELD_FLAGS = 1 << 4  # UCP_OP_ATTR_FIELD_FLAGS
_CLOSE_FORCE = 1  # UCP_EP_CLOSE_FLAG_FORCE


class _RequestParameters(ctypes.Structure):
    """ucp_request_param_t; the last field stands for those that `fields` does not announce."""

    _fields_ = [("fields", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("others", ctypes.c_uint64 * 16)]


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded package.

    Attributes:
        api: the module `ucxx._lib.libucxx`.
        array: wraps an object with a buffer for `api`.
        error: base class of what `api` raises.
    """

    api: Any
    array: Any
    error: type[Exception]
    _ucp: ctypes.CDLL

    def event_fd(self, worker: int) -> int:
        """The descriptor that becomes readable when an armed worker has something to do.

        ucxx has one of its own around it, an epoll set that holds this one and an event nobody here needs.
        """
        fd = ctypes.c_int()
        status = self._ucp.ucp_worker_get_efd(ctypes.c_void_p(worker), ctypes.byref(fd))
        if status != _UCS_OK:
            raise TransferError(f"UCX cannot tell of events (status {status})", code="transport_unavailable")
        return fd.value

    def lanes(self, endpoint: int) -> list[str]:
        """`transport/device` of everything that UCX may use for this endpoint, without repetitions."""
        return [f"{transport}/{device}" for transport, device in lanes_of(self._ucp, endpoint)]

    def discard(self, endpoint: int) -> None:
        """Give back an endpoint that has failed: ucxx closes only those that have not."""
        asked = _RequestParameters(fields=_FIELD_FLAGS, flags=_CLOSE_FORCE)
        request = self._ucp.ucp_ep_close_nbx(ctypes.c_void_p(endpoint), ctypes.byref(asked))
        # Null is done, the topmost values are errors, anything else is a request that UCX ends on its own.
        if request and ctypes.c_int64(request).value > 0:
            self._ucp.ucp_request_free(ctypes.c_void_p(request))


def load() -> Library:
    """Import ucxx. Takes the better part of a second the first time.

    Raises:
        TransferError: `transport_unavailable`.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
    try:
        api = importlib.import_module("ucxx._lib.libucxx")
        array = importlib.import_module("ucxx._lib.arr").Array
    except ImportError as error:
        raise TransferError(
            f"transfer.transport ucx: the package ucxx cannot be loaded ({error}); install slipstream[ucx]",
            code="transport_unavailable",
        ) from error
    finally:
        # ucxx writes settings meant for GPUs into the environment, where every later UCX in this process and its
        # children (NIXL brings one) would find them.
        for name in [name for name in os.environ if name.startswith("UCX_") and name not in before]:
            del os.environ[name]
    # Looked up from ucxx's own module, so that it is the libucp which ucxx uses: there may be others in the process.
    ucp = ctypes.CDLL(api.__file__)
    ucp.ucp_ep_close_nbx.restype = ctypes.c_void_p
    ucp.ucp_request_free.restype = None
    return Library(api, array, api.UCXError, ucp)
