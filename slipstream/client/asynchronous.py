"""The asynchronous client: `slipstream.client.synchronous` with `await`.

    async with AsyncClient("localhost:8001") as client:
        async for piece in client.generate("The capital of France is", max_tokens=16):
            print(piece.text, end="", flush=True)

Cancelling the task that reads an answer cancels the work on every worker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc
import grpc.aio

from slipstream.client.connection import (
    CHANNEL_OPTIONS,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Tls,
    checked_timeout,
    credentials_of,
    key_metadata,
    typed_error,
)
from slipstream.client.results import (
    Completion,
    Ending,
    ModelInfo,
    Piece,
    completion_from_pieces,
    models_from_wire,
    piece_from_wire,
)
from slipstream.client.sampling import ChatMessage, SamplingOptions, chat_request, text_request
from slipstream.security.channels import open_public_channel
from slipstream.v1 import inference_pb2
from slipstream.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:  # these exist for the type checker alone
    from slipstream.v1.inference_pb2_grpc import InferenceAsyncStub

    _Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class AsyncStream:
    """An answer as it arrives: `async for` over its pieces, or `await collect()` the whole.

    The request is sent with the first step. Closing or dropping the stream, or cancelling the task that reads
    it, cancels the work on every worker; `async with` does so at a place of your choosing.
    """

    def __init__(
        self,
        stub: InferenceAsyncStub,
        request: inference_pb2.GenerateRequest,
        target: str,
        timeout_s: float,
        metadata: tuple[tuple[str, str], ...] | None,
    ) -> None:
        self._stub, self._request, self._metadata = stub, request, metadata
        self._target, self._timeout_s = target, timeout_s
        self._call: _Call | None = None
        self._ended = False
        self._ending = Ending()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        if self._call is None:
            self._call = self._stub.Generate(self._request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            self._ended = True
            raise typed_error(error, self._target, self._timeout_s) from None
        except BaseException:
            await self.aclose()
            raise
        if message is grpc.aio.EOF or not isinstance(message, inference_pb2.GenerateResponse):
            self._ended = True
            self._ending.take(await self._call.trailing_metadata())
            raise StopAsyncIteration
        return piece_from_wire(message)

    async def collect(self) -> Completion:
        """Wait for the rest and put it together. Raises what iterating raises."""
        return completion_from_pieces([piece async for piece in self], self.route)

    @property
    def route(self) -> str:
        """Why the request went to its workers, in a word; empty until the answer has ended."""
        return self._ending.route

    async def aclose(self) -> None:
        """Stop the answer. Closing twice, or after the end, does nothing."""
        self._ended = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncClient:
    """A connection to one frontend. Arguments and errors are those of `slipstream.client.Client`."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._target = target
        self._metadata = key_metadata(api_key)
        self._timeout_s = checked_timeout(timeout_s, DEFAULT_TIMEOUT_S)
        self._credentials = credentials_of(tls)
        self._channel: grpc.aio.Channel | None = None
        self._lazy_stub: InferenceAsyncStub | None = None

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """Continue a text, or a sequence of token ids that are used as they are."""
        return self._stream(text_request(prompt, model, request_id, sampling), timeout_s)

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """Answer a conversation, with the model's chat template."""
        return self._stream(chat_request(messages, model, request_id, sampling), timeout_s)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """`generate`, and wait for the whole answer."""
        stream = self.generate(prompt, model=model, timeout_s=timeout_s, request_id=request_id, **sampling)
        return await stream.collect()

    async def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """The models that are served now. Raises UnavailableError, DeadlineError."""
        deadline_s = checked_timeout(timeout_s, self._timeout_s)
        try:
            response = await self._stub().ListModels(
                inference_pb2.ListModelsRequest(), timeout=deadline_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise typed_error(error, self._target, deadline_s) from None
        return models_from_wire(response.models)

    async def aclose(self) -> None:
        """Close the connection; calls that are still open are cancelled."""
        channel, self._channel, self._lazy_stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _stream(self, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> AsyncStream:
        deadline_s = checked_timeout(timeout_s, self._timeout_s)
        return AsyncStream(self._stub(), request, self._target, deadline_s, self._metadata)

    def _stub(self) -> InferenceAsyncStub:
        # The channel belongs to the running loop: made at the first call, as a client may be built before one runs.
        if self._lazy_stub is None:
            self._channel = open_public_channel(self._target, self._credentials, CHANNEL_OPTIONS)
            self._lazy_stub = InferenceStub(self._channel)
        return self._lazy_stub
