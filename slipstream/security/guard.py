"""What every internal server does before a call: looks at its token, and at the role in the peer's certificate."""

from __future__ import annotations

import hmac
import inspect
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from slipstream import grpc_errors, telemetry
from slipstream.errors import ClusterTokenError, RoleError, SlipstreamError
from slipstream.security.identity import Identity
from slipstream.security.names import ComponentName, parse_uri
from slipstream.security.rules import MAY_CALL, OPEN_PREFIX, may_call

log = telemetry.get_logger(__name__)

TOKEN_KEY = "slipstream-cluster-token"
_SAN = "x509_subject_alternative_name"

if TYPE_CHECKING:  # these take parameters for the type checker alone
    Handler = grpc.RpcMethodHandler[Any, Any]
    Details = grpc.HandlerCallDetails
    Context = grpc.aio.ServicerContext[Any, Any]


class Guard(grpc.aio.ServerInterceptor):
    """Refuses what the rules do not let through. A server without protection has none."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._checked: dict[str, tuple[Handler, Handler]] = {}
        self._told: set[tuple[str, str]] = set()

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler | None]], handler_call_details: Details
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_PREFIX):
            return handler
        if not self._token_fits(handler_call_details.invocation_metadata):
            return self._refusing(method, handler, _NO_TOKEN)
        if self._identity.tls is None:
            return handler
        known = self._checked.get(method)
        if known is None or known[0] is not handler:
            known = (handler, _before(handler, lambda context: self._check_role(method, context)))
            if method in MAY_CALL:  # else whoever makes names up would fill it
                self._checked[method] = known
        return known[1]

    def _token_fits(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        tokens = self._identity.tokens
        if tokens is None:
            return True
        said = next((value for name, value in metadata if name == TOKEN_KEY), "")
        given = said if isinstance(said, bytes) else said.encode()
        fits = False
        for token in tokens.current()[1]:
            fits |= hmac.compare_digest(given, token.encode())
        return fits

    async def _check_role(self, method: str, context: Context) -> None:
        name = peer_name(context)
        own = self._identity.own_name()
        if name is None:
            said = "its certificate names no component"
        elif name.cluster != own.cluster:
            said = f"it is of cluster {name.cluster}, and this is {own.cluster}"
        elif not may_call(name.role, method):
            said = f"a {name.role} may not do that"
        else:
            return
        error = RoleError(f"{method} is refused to {name or 'a stranger'}: {said}")
        self._tell(method, str(name), error)
        await grpc_errors.abort(context, error)

    def _refusing(self, method: str, handler: Handler, error: SlipstreamError) -> Handler:
        self._tell(method, "", error)

        async def refuse(context: Context) -> NoReturn:
            await grpc_errors.abort(context, error)

        return _before(handler, refuse)

    def _tell(self, method: str, name: str, error: SlipstreamError) -> None:
        """Once for each kind: who knocks again and again shall not fill the log."""
        kind = (method if method in MAY_CALL else "", name)
        if kind not in self._told and len(self._told) < 1000:
            self._told.add(kind)
            log.warning("call_refused", method=method[:200], peer=name, code=error.code, reason=error.message)


_NO_TOKEN = ClusterTokenError(
    "this cluster wants its token with each call, and this call has another one or none: set "
    "security.cluster_token_file to the file that the other components have"
)


def peer_name(context: Context) -> ComponentName | None:
    """Whose certificate the other side has; None when it is no component's."""
    for name in context.auth_context().get(_SAN, ()):
        found = parse_uri(name.decode("utf-8", "replace") if isinstance(name, bytes) else name)
        if found is not None:
            return found
    return None


def _before(handler: Handler, check: Callable[[Context], Awaitable[None]]) -> Handler:
    """The same handler, that checks first. Streams of answers go on as they did: nothing is added to a message."""
    inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    assert inner is not None

    if handler.response_streaming:

        async def streaming(request: Any, context: Context) -> Any:
            await check(context)
            answers = inner(request, context)
            if not inspect.isasyncgen(answers):
                await answers  # it writes them itself
                return
            async with aclosing(answers):
                async for answer in answers:
                    await context.write(answer)

        both, answers_alone = grpc.stream_stream_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        make = both if handler.request_streaming else answers_alone
        return make(streaming, handler.request_deserializer, handler.response_serializer)

    async def single(request: Any, context: Context) -> Any:
        await check(context)
        return await inner(request, context)

    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return make(single, handler.request_deserializer, handler.response_serializer)
