"""How Slipstream's processes talk gRPC to each other: the options of every internal channel and server.

In one place because both ends must agree: a client that pings to notice a dead peer is thrown out
(`too_many_pings`) by a server that was not told to expect it, and a prompt must not be larger than the
other side accepts.
"""

from __future__ import annotations

from slipstream.limit_settings import LimitSettings

ChannelOptions = list[tuple[str, int]]

MAX_MESSAGE_BYTES = 64 << 20
"""Room for prompts of millions of tokens (at most 5 bytes a token id)."""

KEEPALIVE_TIME_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0

PUBLIC_KEEPALIVE_TIMEOUT_S = 20.0
"""gRPC's own default: a client's answers shall outlive a pause of some seconds, of its network or of either machine."""


def client_options(*, max_reconnect_backoff_s: float = 1.0) -> ChannelOptions:
    """Options for a channel to another component.

    A peer that cannot be connected to fails a call within `CONNECT_TIMEOUT_S`; one that stops answering on an
    open connection fails it within `KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S`. Both are seen as UNAVAILABLE.

    Args:
        max_reconnect_backoff_s: longest pause between two attempts to connect; calls fail at once meanwhile.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        # The limit that counts when the peer is stopped rather than gone: a minute unless set.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name this bounds one connection attempt; refused connections are retried by the two others.
        ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(max_reconnect_backoff_s * 1000)),
        # Channels of one process otherwise share connections, and with them the back-off after a failure.
        ("grpc.use_local_subchannel_pool", 1),
        # Components reach each other directly, whatever http_proxy says for the outside world.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(*, max_receive_bytes: int = MAX_MESSAGE_BYTES) -> ChannelOptions:
    """Options for a server that other components call: accepts the pings that `client_options` sends.

    A second process on the same port is refused instead of silently sharing it.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_TIME_S * 500)),
        # The server's own pings: a client host that vanished must not hold requests open.
        ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 3000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        # The limit that counts when the peer is stopped rather than gone: a minute unless set.
        ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
    ]


def public_server_options(
    limits: LimitSettings, *, max_receive_bytes: int, shares_port: bool = False
) -> ChannelOptions:
    """Options for a server that clients call: what one may take of it before it is refused."""
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", limits.max_grpc_streams),
        ("grpc.max_allowed_incoming_connections", limits.max_grpc_connections),
        # Who opens a connection and says nothing, or something else than HTTP/2.
        ("grpc.server_handshake_timeout_ms", int(limits.header_timeout_s * 1000)),
        # A client host that vanished must not hold calls open.
        ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 3000)),
        ("grpc.keepalive_timeout_ms", int(PUBLIC_KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.ping_timeout_ms", int(PUBLIC_KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # Pings as our own channels send them are in order; a flood of them ends the connection.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_TIME_S * 500)),
        # Clients come back by themselves.
        ("grpc.max_connection_idle_ms", int(limits.keep_alive_s * 1000)),
        # A second server on the same port should fail, not share it, unless it is meant to.
        ("grpc.so_reuseport", int(shares_port)),
    ]
