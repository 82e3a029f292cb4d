"""The HTTP face's outermost layer: a request id for each request, one shape for each error, and the count of both.

Pure ASGI, inside Starlette's own last resort and outside everything else, so that no HTML and no traceback
can reach a client.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontend.cluster_state import STATE_PATH
from frontend.face_metrics import Where
from frontend.inference import INTERNAL_ERROR
from frontend.keys.connections import EXTENSION, ConnectionAccounts
from frontend.keys.guard import Caller, Guard
from frontend.openai_responses import ErrorBody, ErrorDetails, error_body
from frontend.request_ids import safe_request_id, unique_request_id
from frontend.request_life import ROUTE_HEADER, observed
from frontend.request_record import RequestRecord, current
from slipstream import telemetry
from slipstream.errors import (
    CancelledByClientError,
    InvalidApiKeyError,
    MigrationLimitError,
    RequestTooLargeError,
    SlipstreamError,
    SlowRequestError,
)

log = telemetry.get_logger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID_NAME, _ROUTE_NAME = REQUEST_ID_HEADER.lower().encode(), ROUTE_HEADER.encode()
_ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/models": "models",
    "/health/live": "health",
    "/health/ready": "health",
    "/metrics": "metrics",
    STATE_PATH: "cluster",
    "/slipstream/v1/clusters": "clusters",
}
_PREFIXES = (("/v1/models/", "models"), ("/slipstream/v1/requests/", "explain"))
_ABOUT_A_MODEL = frozenset({"chat", "completions"})


def where_of(path: str, model: str) -> Where:
    """The metric labels of a path; what nobody serves is one label, not one for each scanner's guess.

    Args:
        model: the one served, for paths that are about a model.
    """
    endpoint = next((name for start, name in _PREFIXES if path.startswith(start)), "") or _ENDPOINTS.get(path, "other")
    return Where("http", endpoint, model if endpoint in _ABOUT_A_MODEL else "")


class Boundary:
    """ASGI middleware. Puts `request_id` into the request's state, and `caller`: whose key it came with.

    Args:
        model: the one served.
        guard: who may come in; everybody without.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float], model: str, guard: Guard | None = None) -> None:
        self._app = app
        self._clock = clock
        self._model = model
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = safe_request_id(headers.get(REQUEST_ID_HEADER))
        request_id = unique_request_id(asked)
        scope.setdefault("state", {})["request_id"] = request_id
        outgoing = _Outgoing(send, asked or request_id)
        where, method, path = where_of(scope["path"], self._model), scope["method"], scope["path"]
        with observed(where, request_id, method=method, path=path, headers=headers, clock=self._clock) as record:
            try:
                await self._answer(scope, receive, outgoing, record, where.endpoint)
                record.status = str(outgoing.status)
            except CancelledByClientError as error:
                record.status = str(error.http_status)  # nobody is there to read it
                record.error = error.code

    async def _answer(
        self, scope: Scope, receive: Receive, outgoing: _Outgoing, record: RequestRecord, endpoint: str
    ) -> None:
        try:
            scope["state"]["caller"] = caller = self._let_in(scope, endpoint)
            if caller is not None:
                record.note_caller(caller)
            await self._app(scope, receive, outgoing)
        except CancelledByClientError:
            raise
        except SlipstreamError as error:
            if outgoing.status is not None:
                raise
            record.error = error.code
            await error_response(error)(scope, receive, outgoing)
        except Exception:
            record.error = INTERNAL_ERROR.code
            log.exception("request_failed", path=scope["path"])
            if outgoing.status is not None:
                raise
            await error_response(INTERNAL_ERROR)(scope, receive, outgoing)

    def _let_in(self, scope: Scope, endpoint: str) -> Caller | None:
        if self._guard is None:
            return None
        caller = self._guard.http_caller(scope["headers"], endpoint)
        if caller is not None and caller.key.rates.connections is not None:
            accounts: ConnectionAccounts | None = scope.get("extensions", {}).get(EXTENSION)
            if accounts is not None:
                accounts.use(caller.ledger, caller.key)
        return caller


class _Outgoing:
    """`send` that remembers the status and adds the request id."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message["headers"]  # none of ours is among them yet
            headers.append((_REQUEST_ID_NAME, self._request_id.encode("latin-1")))
            record = current()
            if record is not None:
                if record.route:
                    headers.append((_ROUTE_NAME, record.route.encode("latin-1")))
                if record.caller is not None:
                    headers += [(name.encode(), value.encode()) for name, value in record.caller.limit_headers()]
        await self._send(message)


def error_response(error: SlipstreamError) -> Response:
    """OpenAI's shape and status, with Retry-After where the error says when."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, RequestTooLargeError | SlowRequestError):
        headers["Connection"] = "close"  # what is left of the body is not read
    if isinstance(error, InvalidApiKeyError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MigrationLimitError):
        headers["x-should-retry"] = "false"  # OpenAI's clients send what failed with a 5xx again by themselves
    return Response(error_body(error), error.http_status, headers, "application/json")


def as_typed(error: Exception) -> SlipstreamError:
    """What a client may know of an error in the middle of a stream."""
    if isinstance(error, SlipstreamError):
        return error
    log.error("stream_failed", exc_info=error)
    return INTERNAL_ERROR


async def routing_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors (unknown path, wrong method) in the same shape as ours."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]  # request.url is made from the Host header, which may be anything
    wording = {
        404: (f"Unknown request URL: {request.method} {path}. See /docs for what is served.", "unknown_url"),
        405: (f"Method {request.method} is not allowed for {path}.", "method_not_allowed"),
    }
    message, code = wording.get(error.status_code, (str(error.detail), "invalid_request"))
    details = ErrorDetails(message, "invalid_request_error", None, code)
    content = msgspec.json.encode(ErrorBody(details))
    return Response(content, error.status_code, error.headers, "application/json")
