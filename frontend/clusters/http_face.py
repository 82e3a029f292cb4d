"""The HTTP face of a global frontend: a plain ASGI application, since it only looks at a request and passes it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.admission.tenants import TIMEOUT_HEADER, timeout_of
from frontend.clusters.asked import of_body
from frontend.clusters.breaker import Health
from frontend.clusters.fleet import ClusterFleet
from frontend.clusters.forward import Exchange, Forwarding, service_class_of
from frontend.http_boundary import REQUEST_ID_HEADER, Boundary
from frontend.http_exchange import ConnectedResponse, read_body
from frontend.keys.guard import Caller, Guard
from frontend.openai_responses import ModelCard, ModelList
from frontend.request_ids import safe_request_id
from frontend.request_life import SESSION_HEADER
from slipstream.errors import ModelNotFoundError, SlipstreamError, UnavailableError
from slipstream.limit_settings import DEFAULT_LIMITS

GENERATES = frozenset(("/v1/chat/completions", "/v1/completions"))
_LONGEST_SESSION = 200


class _NotServedError(SlipstreamError):
    """A path or method that nobody serves."""

    http_status = 404
    openai_type = "invalid_request_error"
    default_code = "unknown_url"


class _WrongMethodError(SlipstreamError):
    http_status = 405
    openai_type = "invalid_request_error"
    default_code = "method_not_allowed"


def create_app(
    fleet: ClusterFleet,
    *,
    max_body_bytes: int,
    request_timeout_s: float,
    draining: Callable[[], bool],
    body_timeout_s: float = DEFAULT_LIMITS.body_timeout_s,
    metrics: Collector = REGISTRY,
    guard: Guard | None = None,
) -> ASGIApp:
    """The ASGI application."""
    face = GlobalHttpFace(fleet, max_body_bytes, body_timeout_s, request_timeout_s, draining, metrics)
    return Boundary(face, clock=fleet.clock, model="", guard=guard)


class GlobalHttpFace:
    """The routes."""

    def __init__(
        self,
        fleet: ClusterFleet,
        max_body_bytes: int,
        body_timeout_s: float,
        request_timeout_s: float,
        draining: Callable[[], bool],
        metrics: Collector,
    ) -> None:
        self._fleet = fleet
        self._max_body_bytes, self._request_timeout_s = max_body_bytes, request_timeout_s
        self._body_timeout_s = body_timeout_s
        self._draining, self._metrics = draining, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._respond(Request(scope, receive))
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        path, method = request.scope["path"], request.scope["method"]
        if path in GENERATES:
            if method != "POST":
                raise _WrongMethodError(f"Method {method} is not allowed for {path}.")
            return await self._generate(request)
        if method not in ("GET", "HEAD"):
            raise _NotServedError(f"Unknown request URL: {method} {path}.")
        return self._look(path, method, request.state.caller)

    async def _generate(self, request: Request) -> Response:
        if self._draining():
            raise UnavailableError("The global frontend is shutting down.", code="shutting_down")
        body = await read_body(request, self._max_body_bytes, self._body_timeout_s)
        headers = request.scope["headers"]
        timeout_s = self._request_timeout_s
        if said := request.headers.get(TIMEOUT_HEADER):
            timeout_s = min(timeout_s, timeout_of(said))
        asked = of_body(body, request.headers.get(SESSION_HEADER, "")[:_LONGEST_SESSION])
        request_id = safe_request_id(request.headers.get(REQUEST_ID_HEADER)) or request.state.request_id
        path = request.scope["path"]
        caller: Caller | None = request.state.caller
        if caller is not None:
            caller.check_model(asked.model)
        service_class = service_class_of(headers, caller)
        exchange = Exchange(path, headers, body, asked, request_id, timeout_s, service_class, caller)
        return ConnectedResponse(lambda send: self._forward(exchange, send))

    async def _forward(self, exchange: Exchange, send: Send) -> None:
        forwarding, caller = Forwarding(self._fleet, exchange), exchange.caller
        if caller is None:
            await forwarding.run(send)
            return
        with caller.forwarding():
            await forwarding.run(send)

    def _look(self, path: str, method: str, caller: Caller | None) -> Response:
        if path == "/v1/models":
            return _json(ModelList([one for one in self._models() if caller is None or caller.key.may_use(one.id)]))
        if path.startswith("/v1/models/"):
            wanted = path.removeprefix("/v1/models/")
            if caller is not None:
                caller.check_model(wanted)
            for card in self._models():
                if card.id == wanted:
                    return _json(card)
            raise ModelNotFoundError(f"The model '{wanted}' does not exist.", param="model")
        if path == "/health/live":
            return _json({"status": "ok"})
        if path == "/health/ready":
            if self._draining():
                raise UnavailableError("The global frontend is shutting down.", code="shutting_down")
            if not self._fleet.ready:
                raise self._fleet.none_left(self._fleet.members)
            return _json({"status": "ready"})
        if path == "/slipstream/v1/clusters":
            return _json({"clusters": self._clusters()})
        if path == "/metrics":
            return Response(generate_latest(self._metrics), media_type=CONTENT_TYPE_LATEST)
        raise _NotServedError(f"Unknown request URL: {method} {path}.")

    def _models(self) -> list[ModelCard]:
        now_s = self._fleet.clock()
        cards: dict[str, ModelCard] = {}
        for member in self._fleet.members:
            if self._fleet.health(member, "http", now_s) is Health.DOWN or member.known.state is None:
                continue
            for one in member.known.state.models:
                before = cards.get(one.name)
                length = max(one.max_model_len, before.max_model_len if before else 0)
                created = min(one.created_unix_s, before.created if before else one.created_unix_s)
                cards[one.name] = ModelCard(one.name, created, length)
        return [cards[name] for name in sorted(cards)]

    def _clusters(self) -> list[dict[str, Any]]:
        now_s = self._fleet.clock()
        return [
            {
                "endpoint": member.known.endpoint,
                "cluster": member.known.cluster,
                "health": self._fleet.health(member, "http", now_s).value,
                "why": member.known.refusal or member.known.failure,
                "round_trip_s": round(member.known.rtt_s, 6),
                "state_age_s": None if member.known.heard_s is None else round(now_s - member.known.heard_s, 3),
                "in_flight": member.known.in_flight,
                "prefixes": len(member.known.prefixes),
                "state": msgspec.structs.replace(member.known.state, prefixes=None) if member.known.state else None,
            }
            for member in self._fleet.members
        ]


def _json(content: msgspec.Struct | dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
