"""The gRPC face of a global frontend: `slipstream.v1.Inference`, each answer passed on as the bytes that come."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from frontend.admission.tenants import CLASS_HEADER, PREFIX_HEADER, TIMEOUT_HEADER, timeout_of
from frontend.clusters import metrics
from frontend.clusters.asked import Asked, of_call
from frontend.clusters.breaker import Health
from frontend.clusters.fleet import ClusterFleet, Member, Visit
from frontend.clusters.forward import CLUSTER_HEADER, class_of
from frontend.clusters.resume import Passed, resumable
from frontend.grpc_writes import write_within
from frontend.inference import INTERNAL_ERROR
from frontend.keys.guard import KEY_HEADERS, PEER_KEY_HEADER, Caller, Guard
from frontend.keys.vouching import CALLER_HEADER, vouched
from frontend.request_ids import safe_request_id, unique_request_id
from frontend.request_life import SESSION_HEADER
from slipstream import telemetry
from slipstream.errors import (
    ClusterLostError,
    DeadlineError,
    OverloadedError,
    PeerKeyError,
    SlipstreamError,
    UnavailableError,
)
from slipstream.grpc_channels import client_options, public_server_options
from slipstream.grpc_errors import abort, from_rpc_error
from slipstream.limit_settings import DEFAULT_LIMITS, LimitSettings
from slipstream.security.channels import open_public_channel, public_credentials
from slipstream.security.servers import create_public_server
from slipstream.v1 import inference_pb2

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log = telemetry.get_logger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_GENERATE = f"/{SERVICE_NAME}/Generate"
_LONGEST_SESSION = 200
_NOT_PASSED_ON = frozenset(
    (PEER_KEY_HEADER, PREFIX_HEADER, TIMEOUT_HEADER, CALLER_HEADER, "user-agent", "grpc-accept-encoding")
)


class GlobalGrpcFace:
    """The server with everything on it. Create it in the loop it runs in."""

    def __init__(
        self,
        fleet: ClusterFleet,
        *,
        max_message_bytes: int,
        request_timeout_s: float,
        limits: LimitSettings = DEFAULT_LIMITS,
        guard: Guard | None = None,
    ) -> None:
        self._fleet = fleet
        self._guard = guard
        self._write_timeout_s = limits.write_timeout_s
        self._request_timeout_s = request_timeout_s
        self._health = health.aio.HealthServicer()
        self._channels = AsyncExitStack()
        self._stubs: dict[str, grpc.aio.UnaryStreamMultiCallable[Any, Any]] = {}
        self.server = create_public_server(public_server_options(limits, max_receive_bytes=max_message_bytes))
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate, request_deserializer=inference_pb2.GenerateRequest.FromString
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self._list_models,
                request_deserializer=inference_pb2.ListModelsRequest.FromString,
                response_serializer=inference_pb2.ListModelsResponse.SerializeToString,
            ),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    async def start(self) -> None:
        """Begin to serve."""
        for member in self._fleet.members:
            if member.grpc_address:
                channel = await self._channels.enter_async_context(_channel(member))
                self._stubs[member.known.endpoint] = channel.unary_stream(
                    _GENERATE, request_serializer=inference_pb2.GenerateRequest.SerializeToString
                )
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        await self.server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give open ones `grace_s` seconds, then cancel them. Again is fine."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
        await self._channels.aclose()

    async def _generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        failure: SlipstreamError | None
        try:
            caller = self._caller(context)
            call = _Call(
                self._fleet, self._stubs, request, context, self._request_timeout_s, self._write_timeout_s, caller
            )
            failure = await call.run() if caller is None else await self._counted(call, caller, context)
        except SlipstreamError as error:
            failure = error
        except Exception:
            log.exception("request_failed", rpc="Generate")
            failure = INTERNAL_ERROR
        if failure is not None:
            await abort(context, failure)

    def _caller(self, context: Context) -> Caller | None:
        return None if self._guard is None else self._guard.grpc_caller(context.invocation_metadata() or (), "generate")

    async def _counted(self, call: _Call, caller: Caller, context: Context) -> SlipstreamError | None:
        assert self._guard is not None, "it knows the caller"
        with self._guard.peers.calling(caller.ledger, caller.key, context.peer()), caller.forwarding():
            failure = await call.run()
            if failure is not None:
                raise failure  # so that it does not count where it should not
        return None

    async def _list_models(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        try:
            caller = self._caller(context)
        except SlipstreamError as error:
            await abort(context, error)
        now_s = self._fleet.clock()
        models: dict[str, inference_pb2.Model] = {}
        counted = set()
        for member in self._fleet.members:
            known = member.known
            if self._fleet.health(member, "grpc", now_s) is Health.DOWN or known.state is None:
                continue
            for said in known.state.models:
                one = models.setdefault(said.name, inference_pb2.Model(id=said.name, created=said.created_unix_s))
                one.max_model_len = max(one.max_model_len, said.max_model_len)
                if (known.cluster, said.name) not in counted:
                    counted.add((known.cluster, said.name))
                    one.prefill_workers += said.prefill_workers
                    one.decode_workers += said.decode_workers
        shown = [name for name in sorted(models) if caller is None or caller.key.may_use(name)]
        return inference_pb2.ListModelsResponse(models=[models[name] for name in shown])


class _Call:
    """One answer's way; `run` it once."""

    def __init__(
        self,
        fleet: ClusterFleet,
        stubs: dict[str, grpc.aio.UnaryStreamMultiCallable[Any, Any]],
        request: inference_pb2.GenerateRequest,
        context: Context,
        request_timeout_s: float,
        write_timeout_s: float,
        caller: Caller | None,
    ) -> None:
        self._fleet, self._stubs, self._request, self._context = fleet, stubs, request, context
        self._write_timeout_s = write_timeout_s
        left_out = _NOT_PASSED_ON if caller is None else _NOT_PASSED_ON.union(KEY_HEADERS)
        self._metadata = [(name, value) for name, value in context.invocation_metadata() or () if name not in left_out]
        if caller is not None:
            if request.model or caller.key.models is not None:
                caller.check_model(request.model)
            self._metadata.append((CALLER_HEADER, vouched(caller.key, request.model)))
        said = {name: str(value) for name, value in context.invocation_metadata() or ()}
        left_s = context.time_remaining()
        self._timeout_s = min(request_timeout_s, request_timeout_s if left_s is None else left_s)
        if TIMEOUT_HEADER in said:
            self._timeout_s = min(self._timeout_s, timeout_of(said[TIMEOUT_HEADER]))
        self._class = class_of(said.get(CLASS_HEADER, ""), caller)
        self._asked: Asked = of_call(request, said.get(SESSION_HEADER, "")[:_LONGEST_SESSION])
        wanted = safe_request_id(request.request_id)
        self._request_id = wanted or unique_request_id("")
        self._excluded: set[str] = set()
        self._avoided: set[str] = set()
        self._last: list[SlipstreamError] = []
        request.request_id = self._request_id
        self._passed = Passed(request) if resumable(request) else None

    async def run(self) -> SlipstreamError | None:
        """Answer it; returns why not."""
        ends_s = self._fleet.clock() + self._timeout_s
        for _ in range(self._fleet.settings.max_attempts):
            left_s = ends_s - self._fleet.clock()
            if left_s <= 0:
                return DeadlineError(f"The request took longer than the {self._timeout_s:g} s allowed.")
            try:
                visit = self._fleet.choose(
                    self._asked, "grpc", self._class, frozenset(self._excluded), frozenset(self._avoided)
                )
            except UnavailableError as error:
                return self._broken() or self._best() or error
            outcome = "cancelled"
            try:
                outcome, failure = await self._visit(visit, left_s)
            finally:
                self._fleet.end(visit, outcome)
            if outcome in ("answered", "refused", "lost"):
                return failure
            assert failure is not None, "only failures are tried again"
            self._last.append(failure)
            if outcome == "resumed" and await self._took_over():
                return None
        return self._broken() or self._best()

    async def _visit(self, visit: Visit, left_s: float) -> tuple[str, SlipstreamError | None]:
        known, begun = visit.member.known, False
        call = self._stubs[known.endpoint](
            self._request, timeout=left_s, metadata=self._to_send(visit.member), wait_for_ready=False
        )
        try:
            async for message in call:
                if not begun:
                    begun = True
                    self._fleet.answered(visit, self._asked, measured=True)
                passed = message if self._passed is None else self._passed.pass_on(message)
                await write_within(self._context, passed, self._write_timeout_s)
            trailing = [(str(name), value) for name, value in await call.trailing_metadata() or ()]
            cluster = (CLUSTER_HEADER, f"{known.cluster}; {visit.choice.reason.value}")
            self._context.set_trailing_metadata((*trailing, cluster))
        except grpc.aio.AioRpcError as error:
            return self._after(visit, error, begun)
        finally:
            call.cancel()
        return "answered", None

    def _after(self, visit: Visit, error: grpc.aio.AioRpcError, begun: bool) -> tuple[str, SlipstreamError]:
        known, failure = visit.member.known, from_rpc_error(error)
        told = any(name == "slipstream-code" for name, _ in error.trailing_metadata() or ())
        lost = not told and error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        if begun:
            return self._after_beginning(visit, failure, lost=lost)
        self._excluded.add(known.endpoint)
        self._avoided.add(known.cluster)
        if isinstance(failure, OverloadedError):
            metrics.FAILOVERS.labels(known.cluster, "overloaded").inc()
            return "overloaded", failure
        if isinstance(failure, PeerKeyError):
            known.silent("the cluster refuses this global frontend's key", refused=True)
            self._fleet.failed(visit, self._request_id, "refused_key", failure.message)
            return "failed", failure
        if lost or isinstance(failure, UnavailableError) or failure.http_status == 500:
            why = "lost" if lost else "error"
            self._fleet.failed(visit, self._request_id, why, failure.message, unreachable=lost)
            return "failed", failure
        return "refused", failure

    def _after_beginning(self, visit: Visit, failure: SlipstreamError, *, lost: bool) -> tuple[str, SlipstreamError]:
        known = visit.member.known
        if not lost and not isinstance(failure, UnavailableError):
            return "lost", failure
        visit.member.breaker("grpc").failed(self._fleet.clock(), unreachable=False)
        resumed = self._passed is not None and self._passed.exact
        log.warning("cluster_lost", request_id=self._request_id, endpoint=known.endpoint, reason=failure.message,
                    resumed=resumed)  # fmt: skip
        broken = ClusterLostError(f"The cluster was lost in the middle of the answer ({failure.message}); ask again.")
        if not resumed:
            return "lost", broken
        self._excluded.add(known.endpoint)
        self._avoided.add(known.cluster)
        metrics.FAILOVERS.labels(known.cluster, "resumed").inc()
        return "resumed", broken

    async def _took_over(self) -> bool:
        """Whether that was the end of the answer already."""
        assert self._passed is not None, "only what is kept is resumed"
        following = self._passed.take_over()
        if isinstance(following, inference_pb2.GenerateResponse):
            await write_within(self._context, following.SerializeToString(), self._write_timeout_s)
            return True
        self._request = following
        return False

    def _broken(self) -> SlipstreamError | None:
        """What is said of an answer that has begun and does not go on."""
        if self._passed is None or not self._passed.generated:
            return None
        return next((one for one in reversed(self._last) if isinstance(one, ClusterLostError)), None)

    def _best(self) -> SlipstreamError | None:
        overloaded = [one for one in self._last if isinstance(one, OverloadedError)]
        if overloaded:
            return min(overloaded, key=lambda one: one.retry_after_s or float("inf"))
        return self._fleet.none_left(self._fleet.members) if self._last else None

    def _to_send(self, member: Member) -> tuple[tuple[str, str | bytes], ...]:
        names = self._asked.names
        prefix = ((PREFIX_HEADER, names.to_header()),) if names.prompt_bytes else ()
        return (*self._metadata, (PEER_KEY_HEADER, member.key), *prefix)


def _channel(member: Member) -> grpc.aio.Channel:
    credentials = public_credentials(member.ca_file, None, None) if member.tls else None
    return open_public_channel(member.grpc_address, credentials, client_options())
