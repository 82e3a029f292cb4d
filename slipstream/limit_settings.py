"""What a client may take of a frontend's process before it is refused: see docs/security/limits.md."""

from __future__ import annotations

from pydantic import Field

from slipstream.settings_section import Section


class LimitSettings(Section):
    """Limits on clients of the public faces, for each process and each client address; `frontend.max_body_bytes` and
    `frontend.max_n` are two more."""

    max_connections: int = Field(
        16384,
        ge=16,
        le=1 << 20,
        description="HTTP connections of one process; past it the one that has been idle longest is closed, and where "
        "none is idle the new one gets 503. Never more than the process may have files open",
    )
    max_connections_per_address: int = Field(
        4096,
        ge=1,
        le=1 << 20,
        description="HTTP connections of one client address to one process, likewise, with 429; what stands before "
        "the frontends (a proxy, a global frontend) is one address",
    )
    max_header_bytes: int = Field(
        64 << 10, ge=1024, le=16 << 20, description="request line and headers of an HTTP request together; past it 431"
    )
    max_headers: int = Field(100, ge=8, le=10_000, description="headers of an HTTP request; past it 431")
    header_timeout_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="longest wait for an HTTP request's headers, from its first byte (on a new connection: from its "
        "opening); the connection is closed",
    )
    body_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="longest wait for the whole of an HTTP request's body; past it 408"
    )
    keep_alive_s: float = Field(
        75.0, gt=0, le=3600, description="an HTTP connection without a request for this long is closed"
    )
    write_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="a client that takes less than 48 KB of its answer in this time, while more is waiting, is "
        "disconnected, and its request ends",
    )
    max_pipelined: int = Field(
        16, ge=0, le=1000, description="HTTP requests sent ahead on one connection; past it the connection is closed"
    )
    max_grpc_connections: int = Field(
        4096, ge=1, le=1 << 20, description="gRPC connections of one process; more are closed at once"
    )
    max_grpc_streams: int = Field(
        1024, ge=1, le=1 << 20, description="gRPC calls open at once on one connection; more wait at the client"
    )
    max_metadata_bytes: int = Field(
        16 << 10, ge=1024, le=1 << 20, description="metadata of a gRPC call; past it RESOURCE_EXHAUSTED"
    )


DEFAULT_LIMITS = LimitSettings()
