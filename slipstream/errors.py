"""Every error a Slipstream component raises, and the HTTP and gRPC status each becomes.

One tree, so that a face can translate whatever reaches it without knowing where it came from. A message
names the field, the value, the limit and the remedy. `code` and `param` are what OpenAI's error shape
carries; over gRPC they travel as trailing metadata (see `slipstream.grpc_errors`).
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class SlipstreamError(Exception):
    """Base of the tree; raised itself only for what has no better name.

    Attributes:
        message: one sentence for the caller, without a trace of internals.
        param: the request field at fault, or None.
        code: a stable machine-readable name of the cause.
        retry_after_s: seconds after which another try is sensible, or None.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    openai_type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s


class InvalidRequestError(SlipstreamError):
    """The caller's input is wrong; sending it again unchanged cannot succeed."""

    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    openai_type = "invalid_request_error"
    default_code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt and answer do not fit the model's context; the message names both lengths."""

    default_code = "context_length_exceeded"


class UnsupportedError(InvalidRequestError):
    """A field of the API that Slipstream refuses rather than ignores."""

    default_code = "unsupported_parameter"


class PolicyError(InvalidRequestError):
    """A scaling policy is wrong; the message has a line for each error, with the file's line and the field."""

    default_code = "bad_policy"


class ModelNotFoundError(SlipstreamError):
    """No worker serves the model asked for."""

    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND
    openai_type = "invalid_request_error"
    default_code = "model_not_found"


class UnknownRequestError(SlipstreamError):
    """A request that this process does not remember."""

    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND
    openai_type = "invalid_request_error"
    default_code = "unknown_request"


class UnknownDecisionError(SlipstreamError):
    """A decision of the planner that it never made, or has forgotten."""

    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND
    openai_type = "invalid_request_error"
    default_code = "unknown_decision"


class RequestTooLargeError(SlipstreamError):
    """The request body is larger than the configured limit."""

    http_status = 413
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    openai_type = "invalid_request_error"
    default_code = "request_too_large"


class HeadersTooLargeError(SlipstreamError):
    """The request's headers are more, or larger, than the configured limit."""

    http_status = 431
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    openai_type = "invalid_request_error"
    default_code = "headers_too_large"


class SlowRequestError(SlipstreamError):
    """The request did not arrive as a whole within the configured time."""

    http_status = 408
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    openai_type = "invalid_request_error"
    default_code = "request_timeout"


class PeerKeyError(SlipstreamError):
    """A global frontend's key that this cluster does not know."""

    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    openai_type = "invalid_request_error"
    default_code = "invalid_peer_key"


class InvalidApiKeyError(SlipstreamError):
    """No API key, or none that is valid now. The message never has the key in it."""

    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    openai_type = "invalid_request_error"
    default_code = "invalid_api_key"


class NotAllowedError(SlipstreamError):
    """The API key is valid, and not for this; the message names what it is not for."""

    http_status = 403
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    openai_type = "invalid_request_error"
    default_code = "not_allowed"


class RateLimitError(SlipstreamError):
    """The API key has had what it may have; `retry_after_s` says when there is room again."""

    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    openai_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class UnavailableError(SlipstreamError):
    """The cluster cannot serve this now; the same request may succeed later."""

    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    openai_type = "server_error"
    default_code = "unavailable"


class NoWorkerError(UnavailableError):
    """No ready worker of a role that the request needs."""

    default_code = "no_worker"


class NoPolicyError(UnavailableError):
    """The control plane has no scaling policy, and so no planner."""

    default_code = "no_policy"


class NoClusterError(UnavailableError):
    """A global frontend has no cluster that can take the request."""

    default_code = "no_cluster"


class ClusterLostError(UnavailableError):
    """A cluster was lost in the middle of an answer that cannot go on elsewhere."""

    default_code = "cluster_lost"


class WorkerLostError(UnavailableError):
    """A worker died, or went silent, while it held the request."""

    default_code = "worker_lost"


class MigrationLimitError(UnavailableError):
    """Every worker that had this request was lost; it may be what kills them, and goes to no other one."""

    default_code = "migration_limit"


class MigrationBudgetError(UnavailableError):
    """The request's worker was lost, with so many others that the cluster moves no more requests now."""

    default_code = "migration_budget"


class WorkerDrainingError(UnavailableError):
    """The worker finishes what it has and takes nothing new; another one will."""

    default_code = "worker_draining"


class ClusterTokenError(UnavailableError):
    """A component does not have the token that the others share; the cluster is not set up right."""

    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    default_code = "wrong_cluster_token"


class RoleError(UnavailableError):
    """A component made a call that its role may not make, or shows no certificate of this cluster."""

    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    default_code = "role_refused"


class EngineDeadError(UnavailableError):
    """The engine inside a worker has died; the worker ends itself."""

    default_code = "engine_dead"


class EngineSilentError(UnavailableError):
    """The engine inside a worker has requests and takes no step; the worker's service lives and says so."""

    default_code = "engine_silent"


class OverloadedError(SlipstreamError):
    """More is asked of the cluster than it can do; `retry_after_s` is the predicted wait."""

    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    openai_type = "rate_limit_error"
    default_code = "overloaded"


class QueueFullError(OverloadedError):
    """As many requests of this class wait as may wait."""

    default_code = "queue_overflow"


class LongWaitError(OverloadedError):
    """It would wait for longer than requests of its class may."""

    default_code = "long_wait"


class DeadlineUnreachableError(OverloadedError):
    """The request's deadline would come before its turn."""

    default_code = "deadline_unreachable"


class ShedError(OverloadedError):
    """The request waited, and gave way to one that has more right to the place."""

    default_code = "shed"


class DeadlineError(SlipstreamError):
    """A wait ran into its deadline; the message names the wait and the limit."""

    http_status = 504
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    openai_type = "server_error"
    default_code = "deadline_exceeded"


class CancelledByClientError(SlipstreamError):
    """The client went away; nobody reads the answer."""

    http_status = 499
    grpc_status = grpc.StatusCode.CANCELLED
    openai_type = "invalid_request_error"
    default_code = "cancelled"


class TransferError(SlipstreamError):
    """A KV handoff failed; the decode worker computes the prompt itself."""

    default_code = "transfer_failed"


class StartupError(SlipstreamError):
    """A component cannot start; the message names the cause and the remedy."""

    default_code = "startup_failed"


class ConfigError(StartupError):
    """A setting is wrong; the message names the setting, where its value came from and the limit."""

    default_code = "bad_config"
