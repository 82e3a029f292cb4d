"""The OpenAI-compatible HTTP face: the routes, and the two ways to answer, streamed and whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from prometheus_client.registry import Collector
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.cluster_state import STATE_PATH, TellsState
from frontend.explanation import Explainer, Explains
from frontend.face_metrics import TASKS
from frontend.generation import ServedModel
from frontend.http_boundary import Boundary, as_typed, routing_error, where_of
from frontend.http_exchange import (
    DONE,
    ConnectedResponse,
    body_message,
    read_body,
    send_last,
    sse_event,
    sse_events,
    start_message,
)
from frontend.inference import Answer, InferenceRequest, InferenceService
from frontend.keys.guard import PEER_KEY_HEADER, Caller, Guard
from frontend.openai_requests import COMPLETIONS_DEFAULT_MAX_TOKENS, ChatBody, CompletionBody, GenerationBody
from frontend.openai_responses import ModelCard, ModelList, error_body, response_schemas
from frontend.openai_writers import ChatWriter, CompletionWriter, Head, Wishes, Writer, collect
from frontend.request_life import note_broken
from frontend.request_record import current
from frontend.sampling_fields import invalid_request
from slipstream import metric_names
from slipstream.errors import NoWorkerError, UnknownRequestError
from slipstream.limit_settings import DEFAULT_LIMITS
from slipstream.metric_names import KnownNames

Body = TypeVar("Body", ChatBody, CompletionBody)
_READY_RETRY_S = 1.0
_LONGEST_VERSION = 18
_LONGEST_PEER = 64


def create_app(
    service: InferenceService,
    *,
    max_body_bytes: int,
    body_timeout_s: float = DEFAULT_LIMITS.body_timeout_s,
    wall_clock: Callable[[], float] = time.time,
    metrics: Collector = REGISTRY,
    explain: Explains | None = None,
    tells_state: TellsState | None = None,
    guard: Guard | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        max_body_bytes: larger request bodies are refused with 413.
        body_timeout_s: slower ones with 408.
        wall_clock: seconds since the epoch, for the `created` fields.
        metrics: what /metrics shows.
        explain: what to tell of requests that came; nothing without.
        tells_state: what to tell global frontends of the cluster; the path is unknown without.
        guard: who may come in; everybody without.
    """
    app = _App(title="Slipstream", description="OpenAI-compatible serving", redirect_slashes=False)
    app.add_middleware(Boundary, clock=service.clock, model=service.model_name, guard=guard)
    app.add_exception_handler(HTTPException, routing_error)
    face = HttpFace(service, max_body_bytes, body_timeout_s, wall_clock, metrics, explain or Explainer().find)
    for path, body, responds_with, endpoint in (
        ("/v1/chat/completions", ChatBody, "ChatCompletion", face.chat),
        ("/v1/completions", CompletionBody, "Completion", face.completions),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], **_documented(responds_with, body))
        app.direct[path] = Boundary(_Direct(endpoint), service.clock, service.model_name, guard)
    app.add_api_route("/v1/models", face.models, methods=["GET"], **_documented("ModelList"))
    app.add_api_route("/v1/models/{model_id:path}", face.model, methods=["GET"], **_documented("ModelCard"))
    app.add_api_route("/health/live", face.live, methods=["GET"], **_documented(None))
    app.add_api_route("/health/ready", face.ready, methods=["GET"], **_documented(None))
    app.add_api_route("/slipstream/v1/requests/{request_id}", face.explain, methods=["GET"], **_documented(None))
    if tells_state is not None:
        _tell_state(app, tells_state)
    app.add_api_route("/metrics", face.metrics, methods=["GET"], **_documented(None))
    app.openapi = lambda: _openapi(app, service.max_n)  # type: ignore[method-assign]
    return app


def _tell_state(app: FastAPI, tells_state: TellsState) -> None:
    async def state(request: Request) -> Response:
        version = request.query_params.get("prefixes", "")
        known = int(version) if version.isascii() and version.isdecimal() and len(version) < _LONGEST_VERSION else -1
        key, peer = request.headers.get(PEER_KEY_HEADER, ""), request.query_params.get("peer", "")
        return Response(await tells_state(key, peer[:_LONGEST_PEER], known), media_type="application/json")

    app.add_api_route(STATE_PATH, state, methods=["GET"], **_documented(None))


class _App(FastAPI):
    """FastAPI, past which the requests go that there are many of: its layers take a tenth of a request's CPU time.

    Attributes:
        direct: by path, what answers a POST; the routes of the same path are what the OpenAPI document is made from,
            and answer the wrong methods.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.direct: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            direct = self.direct.get(scope["path"])
            if direct is not None:
                await direct(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


@dataclass(frozen=True, slots=True)
class _Direct:
    """An endpoint as an ASGI application."""

    endpoint: Callable[[Request], Awaitable[Response]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(Request(scope, receive))
        await response(scope, receive, send)


@dataclass(frozen=True, slots=True)
class HttpFace:
    """The endpoints."""

    service: InferenceService
    max_body_bytes: int
    body_timeout_s: float
    wall_clock: Callable[[], float]
    families: Collector
    explains: Explains

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await self._body(request, ChatBody)
        asked = self._asked(request, body, None)
        return self._respond(asked, body, ChatWriter)

    async def completions(self, request: Request) -> Response:
        """Go on with a text."""
        body = await self._body(request, CompletionBody)
        asked = self._asked(request, body, COMPLETIONS_DEFAULT_MAX_TOKENS)
        return self._respond(asked, body, CompletionWriter)

    async def models(self, request: Request) -> Response:
        """Models served now, of those that the caller's key is for."""
        caller: Caller | None = request.state.caller
        served = [one for one in self.service.models() if caller is None or caller.key.may_use(one.name)]
        return _json(ModelList([_card(model) for model in served]))

    async def model(self, request: Request, model_id: str) -> Response:
        """One model served now."""
        caller: Caller | None = request.state.caller
        if caller is not None:
            caller.check_model(model_id)
        return _json(_card(self.service.served_model(model_id)))

    async def live(self) -> Response:
        """Whether the frontend runs."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether a request would be answered now; 503 with the reason when not."""
        if self.service.closing:
            raise NoWorkerError("The frontend is shutting down.", code="shutting_down")
        if not self.service.ready:
            raise NoWorkerError("No decode worker is ready yet.", retry_after_s=_READY_RETRY_S)
        return _json({"status": "ready"})

    async def explain(self, request_id: str) -> Response:
        """How a request came to its workers, and why to those."""
        found = await self.explains(request_id)
        if not found:
            raise UnknownRequestError(f"Request '{request_id}' is not among the last that came to this frontend.")
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        TASKS.set(len(asyncio.all_tasks()))
        page = KnownNames(self.families, metric_names.FRONTEND, model=self.service.model_name)
        return Response(generate_latest(page), media_type=CONTENT_TYPE_LATEST)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        content = await read_body(request, self.max_body_bytes, self.body_timeout_s)
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise invalid_request(error) from error

    def _asked(
        self, request: Request, body: ChatBody | CompletionBody, default_max_tokens: int | None
    ) -> InferenceRequest:
        record = current()
        if record is not None and not record.session:
            record.session = body.session_of_user
        return InferenceRequest(
            request_id=request.state.request_id,
            model=body.model,
            prompts=body.prompts(),
            sampling=body.params(),
            where=where_of(request.scope["path"], self.service.model_name),
            n=1 if body.n is None else body.n,
            default_max_tokens=default_max_tokens,
            claim=self.service.tenants.of_http(request.scope["headers"], body.service_tier, request.state.caller),
            caller=request.state.caller,
            cache_salt=body.cache_salt or "",
        )

    def _respond(
        self, asked: InferenceRequest, body: GenerationBody, kind: type[ChatWriter] | type[CompletionWriter]
    ) -> Response:
        wishes = Wishes(
            logprobs=asked.sampling.HasField("logprobs"),
            usage_chunk=body.include_usage,
            account=body.include_account,
        )

        def writer(answer: Answer) -> Writer:
            head = Head(answer.request_id, int(self.wall_clock()), answer.model)
            return kind(head, wishes, self.service.text_model)

        answering = self._stream if body.stream else self._whole
        return ConnectedResponse(lambda send: answering(asked, writer, send))

    async def _whole(self, asked: InferenceRequest, writer: Callable[[Answer], Writer], send: Send) -> None:
        async with self.service.answer(asked) as answer:
            collected = await collect(answer)
            content = msgspec.json.encode(writer(answer).whole(answer, collected))
        headers = {"content-type": "application/json", "content-length": str(len(content))}
        await send(start_message(headers | _worker_headers(answer)))
        await send(body_message(content, more=False))

    async def _stream(self, asked: InferenceRequest, writer: Callable[[Answer], Writer], send: Send) -> None:
        started = False
        try:
            async with self.service.answer(asked) as answer:
                writing = writer(answer)
                async for delta in answer:
                    # Not before the first delta: an error until then is a proper status.
                    if not started:
                        started = True
                        await send(start_message())
                    if events := writing.events(delta, answer):
                        await send(body_message(events, more=True))
                ending = sse_events(list(writing.last_chunks(answer))) + DONE
        except Exception as error:
            if not started:
                raise
            typed = as_typed(error)
            note_broken(asked.where, typed.code)
            ending = sse_event(error_body(typed))
        await send_last(send, body_message(ending, more=False))


def _worker_headers(answer: Answer) -> dict[str, str]:
    account = answer.accounts.get(0)
    if account is None:
        return {}
    workers = {"x-slipstream-prefill-worker": account.prefill_worker}
    workers["x-slipstream-decode-worker"] = account.decode_worker
    return {name: worker for name, worker in workers.items() if worker}


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(model.name, model.created_unix_s, model.max_model_len)


def _json(content: msgspec.Struct | dict[str, str]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _documented(responds_with: str | None, body: type[GenerationBody] | None = None) -> dict[str, Any]:
    """What FastAPI writes into the OpenAPI document; parsing and encoding are ours."""
    error: dict[str, Any] = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    responses: dict[int | str, Any] = {"default": {"description": "Error", "content": error}}
    if responds_with is not None:
        schema = {"schema": {"$ref": f"#/components/schemas/{responds_with}"}}
        content: dict[str, Any] = {"application/json": schema}
        if body is not None:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        responses[200] = {"description": "Success", "content": content}
    documented: dict[str, Any] = {"responses": responses, "response_class": Response}
    if body is not None:
        reference = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        documented["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": reference}}}
    return documented


def _openapi(app: FastAPI, max_n: int) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _names, definitions = models_json_schema(
            [(ChatBody, "validation"), (CompletionBody, "validation")], ref_template="#/components/schemas/{model}"
        )
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(cast("dict[str, Any]", definitions["$defs"]) | response_schemas())
        for body in (ChatBody, CompletionBody):
            components[body.__name__]["properties"]["n"]["anyOf"][0]["maximum"] = max_n
        app.openapi_schema = document
    return app.openapi_schema
