"""Which transports and devices a UCX endpoint uses: `ucp_ep_query`, which neither ucxx nor NIXL passes on."""

from __future__ import annotations

import ctypes

_UCS_OK = 0
_FIELD_TRANSPORTS = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_MOST_LANES = 64


class _Lane(ctypes.Structure):
    """ucp_transport_entry_t"""

    _fields_ = [("transport", ctypes.c_char_p), ("device", ctypes.c_char_p)]


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t"""

    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_address", ctypes.c_uint64 * 16),
        ("remote_address", ctypes.c_uint64 * 16),
        ("lanes", ctypes.POINTER(_Lane)),
        ("lane_count", ctypes.c_uint),
        ("lane_bytes", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    ]


def lanes_of(ucp: ctypes.CDLL, endpoint: int) -> list[tuple[str, str]]:
    """(transport, device) of each lane, without repetitions; to be called by the thread that uses the endpoint.

    Args:
        ucp: the libucp that the endpoint (`ucp_ep_h`) belongs to.
    """
    room = (_Lane * _MOST_LANES)()
    asked = _EndpointAttributes(
        field_mask=_FIELD_TRANSPORTS, lanes=room, lane_count=_MOST_LANES, lane_bytes=ctypes.sizeof(_Lane)
    )
    if ucp.ucp_ep_query(ctypes.c_void_p(endpoint), ctypes.byref(asked)) != _UCS_OK:
        return []
    used = [lane for lane in room[: asked.lane_count] if lane.transport and lane.device]
    return list(dict.fromkeys((lane.transport.decode(), lane.device.decode()) for lane in used))
