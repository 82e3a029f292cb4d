"""What a failed call says about the worker at its other end, and what to do about it."""

from __future__ import annotations

from enum import StrEnum

from frontend.router import RETRY_AFTER_S, Fallback
from slipstream.errors import (
    CancelledByClientError,
    EngineDeadError,
    EngineSilentError,
    InvalidRequestError,
    RequestTooLargeError,
    SlipstreamError,
    UnavailableError,
    WorkerLostError,
)
from slipstream.v1.registry_pb2 import Role, WorkerRecord


class FailureKind(StrEnum):
    """LOST and TIMEOUT: nobody is there, avoid the worker. SILENT: it is there, and does not compute; avoid it too.
    REFUSED: it said no. FAILED: it broke on this request."""

    LOST = "lost"
    TIMEOUT = "timeout"
    SILENT = "silent"
    REFUSED = "refused"
    FAILED = "failed"

    @property
    def suspicious(self) -> bool:
        """Whether others had better not go there either."""
        return self in (FailureKind.LOST, FailureKind.TIMEOUT, FailureKind.SILENT)

    @property
    def fatal(self) -> bool:
        """Whether the request may be what the worker died of. Of a silent one that would be a guess upon a guess."""
        return self in (FailureKind.LOST, FailureKind.TIMEOUT)


_FALLBACKS = {
    FailureKind.LOST: Fallback.PREFILL_LOST,
    FailureKind.TIMEOUT: Fallback.PREFILL_TIMEOUT,
    FailureKind.SILENT: Fallback.PREFILL_TIMEOUT,
    FailureKind.REFUSED: Fallback.PREFILL_REFUSED,
    FailureKind.FAILED: Fallback.PREFILL_FAILED,
}
_LOST = frozenset(cls.default_code for cls in (WorkerLostError, EngineDeadError, CancelledByClientError))


class WorkerFailure(Exception):  # noqa: N818 - not an error of the request: another worker may serve it
    """A worker did not do its part of a request; never leaves the dispatcher."""

    def __init__(self, worker: WorkerRecord, kind: FailureKind, cause: SlipstreamError) -> None:
        super().__init__(cause.message)
        self.worker = worker
        self.kind = kind
        self.cause = cause

    @property
    def role(self) -> str:
        return Role.Name(self.worker.role).removeprefix("ROLE_").lower()

    @property
    def fallback(self) -> Fallback:
        """The reason given when decode has to do this prefill worker's part."""
        return _FALLBACKS[self.kind]

    def as_error(self, why_final: str) -> SlipstreamError:
        """What the client is told when no other worker can take over; `why_final` says why."""
        if self.kind is FailureKind.REFUSED or self.kind is FailureKind.FAILED:
            cause = self.cause
            # Not the cause itself: raised, it would have the frames of whoever keeps this failure, which has it.
            return type(cause)(
                cause.message,
                param=cause.param,
                code=cause.code,
                retry_after_s=cause.retry_after_s or RETRY_AFTER_S,
            )
        return WorkerLostError(
            f"{self.role} worker {self.worker.worker_id} was lost ({self.cause.message}); {why_final}",
            retry_after_s=RETRY_AFTER_S,
        )


def is_of_request(cause: SlipstreamError) -> bool:
    """Whether the request is at fault: no other worker would take it."""
    return isinstance(cause, InvalidRequestError) or cause.code == RequestTooLargeError.default_code


def failure_of(worker: WorkerRecord, cause: SlipstreamError) -> WorkerFailure:
    """What a worker's refusal of a request, or the end of its stream, says of the worker."""
    # The transport's own UNAVAILABLE carries no code of ours and comes back as plain `worker_lost`. A server that is
    # torn down cancels its calls; whoever else cancels one is this process, which does not read it then.
    if cause.code in _LOST:
        return WorkerFailure(worker, FailureKind.LOST, cause)
    if cause.code == EngineSilentError.default_code:
        return WorkerFailure(worker, FailureKind.SILENT, cause)
    if isinstance(cause, WorkerLostError | RequestTooLargeError):  # by status alone: the code says what it is
        cause = UnavailableError(cause.message, code=cause.code, retry_after_s=cause.retry_after_s)
    kind = FailureKind.REFUSED if isinstance(cause, UnavailableError) else FailureKind.FAILED
    return WorkerFailure(worker, kind, cause)
