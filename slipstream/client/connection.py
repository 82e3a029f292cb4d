"""What both clients share about the way to the cluster: channel options, deadlines, and errors with a remedy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from slipstream import errors
from slipstream.grpc_errors import CODE_KEY, from_rpc_error
from slipstream.security.channels import public_credentials

DEFAULT_TARGET = "localhost:8001"
DEFAULT_TIMEOUT_S = 600.0

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    # An answer with logprobs can be larger than gRPC's default of 4 MiB, and a long prompt too.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A peer that vanished without closing (a cable, a suspended machine) is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


@dataclass(frozen=True, slots=True)
class Tls:
    """A connection over TLS.

    Attributes:
        ca_file: whom to trust; the system's authorities when None.
        certificate_file, key_file: of this client, where the face asks for one.
    """

    ca_file: Path | str | None = None
    certificate_file: Path | str | None = None
    key_file: Path | str | None = None


def credentials_of(tls: Tls | None) -> grpc.ChannelCredentials | None:
    """What a channel needs; None for a plain one.

    Raises:
        ConfigError: a file cannot be read.
    """
    return None if tls is None else public_credentials(tls.ca_file, tls.certificate_file, tls.key_file)


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...] | None:
    """What shows a frontend that the caller has a key.

    Raises:
        InvalidRequestError: it cannot be one.
    """
    if api_key is None:
        return None
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        raise errors.InvalidRequestError("api_key has characters that no key has", param="api_key")
    return (("authorization", f"Bearer {api_key}"),)


def checked_timeout(timeout_s: float | None, default_s: float) -> float:
    """The deadline of one call in seconds.

    Raises:
        InvalidRequestError: not a positive, finite number; a wait without an end is not offered.
    """
    chosen = default_s if timeout_s is None else timeout_s
    if not (math.isfinite(chosen) and chosen > 0):
        raise errors.InvalidRequestError(
            f"timeout_s = {chosen} must be a positive number of seconds", param="timeout_s"
        )
    return chosen


def typed_error(error: grpc.RpcError, target: str, timeout_s: float) -> errors.SlipstreamError:
    """The error of a failed call, with a remedy where it is the way to the cluster that failed."""
    if isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        ours = any(key == CODE_KEY for key, _ in error.trailing_metadata() or ())
        if not ours and error.code() is grpc.StatusCode.UNAVAILABLE:
            return errors.UnavailableError(
                f"cannot reach a Slipstream frontend at {target} ({error.details()}); "
                "check the address, and that the cluster is up (`slipstream status`)"
            )
        if not ours and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineError(f"the answer from {target} was not complete within timeout_s = {timeout_s:g}")
    return from_rpc_error(error)
