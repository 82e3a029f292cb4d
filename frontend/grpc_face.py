"""The gRPC face: `slipstream.v1.Inference`, standard health checking and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from frontend.admission.claim import Claim
from frontend.cache_salt import checked_salt
from frontend.face_metrics import Where
from frontend.grpc_writes import write_within
from frontend.inference import INTERNAL_ERROR, Answer, AnswerDelta, InferenceRequest, InferenceService
from frontend.keys.guard import Caller, Guard
from frontend.openai_requests import MAX_MESSAGES
from frontend.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from frontend.request_ids import safe_request_id, unique_request_id
from frontend.request_life import ROUTE_HEADER, observed
from frontend.request_record import current
from frontend.sampling_fields import checked_params
from slipstream import telemetry
from slipstream.errors import InvalidRequestError, SlipstreamError
from slipstream.grpc_channels import public_server_options
from slipstream.grpc_errors import abort
from slipstream.limit_settings import DEFAULT_LIMITS, LimitSettings
from slipstream.security.servers import create_public_server
from slipstream.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = telemetry.get_logger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
# How old a health status may be: readiness is looked at, not pushed.
HEALTH_PERIOD_S = 0.25


@dataclass(frozen=True, slots=True)
class _Call:
    request: inference_pb2.GenerateRequest
    request_id: str
    shown_id: str


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`Generate` and `ListModels`. A cancelled call cancels its task, and with it the work on every worker."""

    def __init__(
        self,
        service: InferenceService,
        guard: Guard | None = None,
        write_timeout_s: float = DEFAULT_LIMITS.write_timeout_s,
    ) -> None:
        self._service = service
        self._guard = guard
        self._write_timeout_s = write_timeout_s
        self._where = Where("grpc", "generate", service.model_name)

    async def Generate(  # type: ignore[override]  # noqa: N802 (the stubs know only generators)
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Stream one answer. Errors are statuses; see `slipstream.grpc_errors`.

        Writes to the context, and is no generator: a cancelled call then unwinds here, at once and in this task.
        """
        wanted = safe_request_id(request.request_id)
        request_id = unique_request_id(wanted)
        metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
        with observed(
            self._where, request_id, method="rpc", path="Generate", headers=metadata, clock=self._service.clock
        ) as record:
            record.status = grpc.StatusCode.CANCELLED.name
            failure = await self._generate(_Call(request, request_id, wanted or request_id), context)
            record.status = (failure.grpc_status if failure else grpc.StatusCode.OK).name
            record.error = failure.code if failure else ""
        if failure is not None:
            await abort(context, failure)

    async def _generate(self, call: _Call, context: Context) -> SlipstreamError | None:
        try:
            metadata = context.invocation_metadata() or ()
            caller = self._caller(metadata)
            claim = self._service.tenants.of_grpc(metadata, context.time_remaining(), caller)
            asked = _asked(call.request, call.request_id, self._where, claim, caller)
            async with self._connected(caller, context), self._service.answer(asked) as answer:
                async for delta in answer:
                    await write_within(context, _response(delta, answer, call.shown_id), self._write_timeout_s)
            record = current()
            limits = caller.limit_headers() if caller is not None else []
            route = [(ROUTE_HEADER, record.route)] if record is not None and record.route else []
            if route or limits:
                # At the end, because a message of its own before the first token would cost each answer a write.
                context.set_trailing_metadata((*route, *limits))
        except SlipstreamError as error:
            return error
        except Exception:
            log.exception("request_failed", rpc="Generate")
            return INTERNAL_ERROR
        return None

    def _caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller | None:
        if self._guard is None:
            return None
        caller = self._guard.grpc_caller(metadata, "generate")
        record = current()
        if record is not None and caller is not None:
            record.note_caller(caller)
        return caller

    @asynccontextmanager
    async def _connected(self, caller: Caller | None, context: Context) -> AsyncIterator[None]:
        if caller is None or self._guard is None or caller.key.rates.connections is None:
            yield
            return
        with self._guard.peers.calling(caller.ledger, caller.key, context.peer()):
            yield

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """Models served now, and by how many workers, of those that the caller's key is for."""
        try:
            caller = self._caller(context.invocation_metadata() or ())
        except SlipstreamError as error:
            await abort(context, error)
        models = [
            inference_pb2.Model(
                id=model.name,
                max_model_len=model.max_model_len,
                prefill_workers=model.prefill_workers,
                decode_workers=model.decode_workers,
                created=model.created_unix_s,
            )
            for model in self._service.models()
            if caller is None or caller.key.may_use(model.name)
        ]
        return inference_pb2.ListModelsResponse(models=models)


class _Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # has no types
    """What is served, for those who may come in."""

    def __init__(self, names: Iterable[str], guard: Guard | None) -> None:
        super().__init__(names)
        self._guard = guard

    async def ServerReflectionInfo(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        if self._guard is not None:
            try:
                self._guard.grpc_caller(context.invocation_metadata() or (), "reflection")
            except SlipstreamError as error:
                await abort(context, error)
        async for one in super().ServerReflectionInfo(request_iterator, context):
            yield one


class GrpcFace:
    """The server with everything on it. Create it in the loop it runs in.

    Args:
        max_message_bytes: larger requests are refused with RESOURCE_EXHAUSTED.
        shares_port: with other processes of the same pool.
        guard: who may come in; everybody without.
        limits: of clients.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        max_message_bytes: int,
        shares_port: bool = False,
        guard: Guard | None = None,
        limits: LimitSettings = DEFAULT_LIMITS,
    ) -> None:
        self._service = service
        self._health = health.aio.HealthServicer()
        self.server = create_public_server(
            public_server_options(limits, max_receive_bytes=max_message_bytes, shares_port=shares_port)
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(
            InferenceServicer(service, guard, limits.write_timeout_s), self.server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(names, guard), self.server)

    async def start(self) -> None:
        """Begin to serve. Until `watch_readiness` has looked, health is NOT_SERVING."""
        await self._set_health(ready=False)
        await self.server.start()

    async def watch_readiness(self) -> None:
        """Keep the health status up to date, for ever."""
        while True:
            await self._set_health(ready=self._service.ready)
            await asyncio.sleep(HEALTH_PERIOD_S)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give open ones `grace_s` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)

    async def _set_health(self, *, ready: bool) -> None:
        serving = health_pb2.HealthCheckResponse.ServingStatus
        for name in ("", SERVICE_NAME):
            await self._health.set(name, serving.SERVING if ready else serving.NOT_SERVING)


def _asked(
    request: inference_pb2.GenerateRequest, request_id: str, where: Where, claim: Claim, caller: Caller | None
) -> InferenceRequest:
    return InferenceRequest(
        request_id=request_id,
        model=request.model,
        prompts=[_prompt(request)],
        sampling=checked_params(request.sampling),
        where=where,
        claim=claim,
        cache_salt=checked_salt(request.cache_salt),
        caller=caller,
    )


def _prompt(request: inference_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text, "text")
        case "token_ids":
            return TokenPrompt(list(request.token_ids.ids), "token_ids")
        case "chat":
            if not request.chat.messages:
                raise InvalidRequestError("'chat' has no messages; at least one is needed.", param="chat.messages")
            if len(request.chat.messages) > MAX_MESSAGES:
                raise InvalidRequestError(
                    f"'chat' has {len(request.chat.messages)} messages; at most {MAX_MESSAGES} are allowed.",
                    param="chat.messages",
                )
            messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
            return ChatPrompt(messages, param="chat.messages")
        case _:
            raise InvalidRequestError("The request has no input: set text, token_ids or chat.", param="input")


def _response(delta: AnswerDelta, answer: Answer, request_id: str) -> inference_pb2.GenerateResponse:
    piece = delta.piece
    response = inference_pb2.GenerateResponse(
        request_id=request_id,
        model=answer.model,
        text=piece.text,
        token_ids=[token.token_id for token in piece.arrived],
        logprobs=[token.logprobs for token in piece.arrived if token.logprobs is not None],
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        account=delta.account,
    )
    if piece.finished:
        usage = answer.usage
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.cached_tokens = usage.cached_tokens
    return response
