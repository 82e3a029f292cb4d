"""Errors across gRPC: a typed error becomes a status with trailing metadata, and comes back the same type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
import grpc.aio

from slipstream import errors
from slipstream.v1.worker_pb2 import Failure

CODE_KEY = "slipstream-code"
PARAM_KEY = "slipstream-param"
RETRY_KEY = "slipstream-retry-after-s"


def _tree(cls: type[errors.SlipstreamError]) -> Iterator[type[errors.SlipstreamError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


# Those that everybody knows: what a module adds to one for its own use comes back as that one.
_BY_CODE = {cls.default_code: cls for cls in _tree(errors.SlipstreamError) if cls.__module__ == errors.__name__}
# A status without our metadata: a proxy, a dead connection, or another implementation.
_BY_STATUS: dict[grpc.StatusCode, type[errors.SlipstreamError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: errors.InvalidApiKeyError,
    grpc.StatusCode.PERMISSION_DENIED: errors.NotAllowedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.RequestTooLargeError,
    grpc.StatusCode.UNAVAILABLE: errors.WorkerLostError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.CANCELLED: errors.CancelledByClientError,
}

_STATUS: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.SlipstreamError) -> NoReturn:
    """End a call with the status, message and metadata of `error`. Raises (gRPC's own AbortError)."""
    metadata = [(CODE_KEY, error.code)]
    if error.param is not None:
        metadata.append((PARAM_KEY, error.param))
    if error.retry_after_s is not None:
        metadata.append((RETRY_KEY, f"{error.retry_after_s:.3f}"))
    await context.abort(error.grpc_status, error.message, tuple(metadata))
    raise AssertionError("unreachable: abort raises")


def to_failure(error: errors.SlipstreamError) -> Failure:
    """What `abort` says of a whole call, of one request among those of a stream."""
    return Failure(
        code=error.code,
        message=error.message,
        param=error.param or "",
        retry_after_s=error.retry_after_s or 0.0,
        status=error.grpc_status.value[0],
    )


def from_failure(failure: Failure) -> errors.SlipstreamError:
    """The typed error behind it."""
    status = _STATUS.get(failure.status, grpc.StatusCode.UNKNOWN)
    cls = _BY_CODE.get(failure.code) or _BY_STATUS.get(status, errors.SlipstreamError)
    return cls(
        failure.message,
        param=failure.param or None,
        code=failure.code or None,
        retry_after_s=failure.retry_after_s or None,
    )


def from_rpc_error(error: grpc.aio.AioRpcError | grpc.RpcError) -> errors.SlipstreamError:
    """The typed error behind a failed call, for calls made with `grpc.aio` or the synchronous API."""
    metadata: dict[str, str | bytes] = {}
    status, details = grpc.StatusCode.UNKNOWN, None
    if isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        status, details = error.code(), error.details()
        metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    code = _text(metadata.get(CODE_KEY))
    cls = _BY_CODE.get(code or "") or _BY_STATUS.get(status, errors.SlipstreamError)
    retry = _text(metadata.get(RETRY_KEY))
    return cls(
        details or str(status),
        param=_text(metadata.get(PARAM_KEY)),
        code=code,
        retry_after_s=float(retry) if retry else None,
    )


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
