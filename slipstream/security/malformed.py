"""Bytes that are no message of the kind that a call takes: the caller's mistake, and told as one.

gRPC itself answers UNKNOWN with the insides of the parser, and puts a traceback into the log for each, which a hostile
client can have as many of as it likes. Here the bytes reach the method's wrapper as `_Unreadable`, and the call ends
with INVALID_ARGUMENT before the method is entered.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from slipstream.errors import InvalidRequestError
from slipstream.grpc_errors import abort

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]


class _Unreadable:
    """In place of a message."""


_UNREADABLE = _Unreadable()


class UnreadableMessages(grpc.aio.ServerInterceptor):
    """For every method of a server."""

    def __init__(self) -> None:
        self._wrapped: dict[int, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        known = self._wrapped.get(id(handler))
        if known is None or known[0] is not handler:
            known = self._wrapped[id(handler)] = (handler, _checked(handler))
        return known[1]


def _checked(handler: Any) -> Handler:
    parse = handler.request_deserializer

    def read(content: bytes) -> Any:
        try:
            return parse(content)
        except DecodeError:
            return _UNREADABLE

    streams = (handler.request_streaming, handler.response_streaming)
    method: Any = {
        (False, False): handler.unary_unary,
        (False, True): handler.unary_stream,
        (True, False): handler.stream_unary,
        (True, True): handler.stream_stream,
    }[streams]
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[streams]
    prepare = _each if handler.request_streaming else _one
    wrapped = _generator(method, prepare) if inspect.isasyncgenfunction(method) else _coroutine(method, prepare)
    return cast("Handler", make(wrapped, read, handler.response_serializer))


async def _refuse(context: Context) -> None:
    await abort(
        context,
        InvalidRequestError("The request is no message of the kind that this method takes.", code="bad_message"),
    )


async def _one(request: Any, context: Context) -> Any:
    if request is _UNREADABLE:
        await _refuse(context)
    return request


async def _each(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    async def readable() -> AsyncIterator[Any]:
        async for request in requests:
            if request is _UNREADABLE:
                await _refuse(context)
            yield request

    return readable()


def _coroutine(method: Any, prepare: Any) -> Any:
    async def called(request: Any, context: Context) -> Any:
        return await method(await prepare(request, context), context)

    return called


def _generator(method: Any, prepare: Any) -> Any:
    async def called(request: Any, context: Context) -> AsyncIterator[Any]:
        async with aclosing(method(await prepare(request, context), context)) as answers:
            async for answer in answers:
                yield answer

    return called
