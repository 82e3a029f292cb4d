"""The synchronous client. See `slipstream.client` for how it is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

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
from slipstream.security.channels import open_blocking_public_channel
from slipstream.v1 import inference_pb2
from slipstream.v1.inference_pb2_grpc import InferenceStub


class Stream:
    """An answer as it arrives: iterate over its pieces, or `collect()` the whole.

    The request is sent with the first step. Leaving the loop early, closing the stream or dropping it cancels
    the work on every worker.
    """

    def __init__(self, pieces: Generator[Piece, None, None], ending: Ending) -> None:
        self._pieces = pieces
        self._ending = ending

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def collect(self) -> Completion:
        """Wait for the rest and put it together. Raises what iterating raises."""
        return completion_from_pieces(list(self), self.route)

    @property
    def route(self) -> str:
        """Why the request went to its workers, in a word; empty until the answer has ended."""
        return self._ending.route

    def close(self) -> None:
        """Stop the answer. Closing twice, or after the end, does nothing."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to one frontend; safe to use from several threads.

    Args:
        target: host:port of the frontend's gRPC face.
        timeout_s: longest any call may take in all, unless the call says otherwise.
        tls: whom to trust, and who this is; None: the connection is plain.
        api_key: where the frontend demands one.
    """

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
        self._channel = open_blocking_public_channel(target, credentials_of(tls), CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Continue a text, or a sequence of token ids that are used as they are.

            for piece in client.generate("Once upon a time", max_tokens=64, temperature=0.7):
                print(piece.text, end="", flush=True)

        Args:
            model: may be empty when the cluster serves one model.
            timeout_s: longest the whole answer may take; the client's own when None.
            request_id: found in the logs of every worker; made up when empty.

        Raises:
            InvalidRequestError: here or at the first step. At any step also ModelNotFoundError,
                UnavailableError (and its kinds), DeadlineError.
        """
        return self._stream(text_request(prompt, model, request_id, sampling), timeout_s)

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Answer a conversation, with the model's chat template. Arguments and errors as in `generate`.

        answer = client.chat([{"role": "user", "content": "Hello!"}], max_tokens=32).collect()
        """
        return self._stream(chat_request(messages, model, request_id, sampling), timeout_s)

    def complete(
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
        return stream.collect()

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """The models that are served now. Raises UnavailableError, DeadlineError."""
        deadline_s = checked_timeout(timeout_s, self._timeout_s)
        try:
            response = self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=deadline_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise typed_error(error, self._target, deadline_s) from None
        return models_from_wire(response.models)

    def close(self) -> None:
        """Close the connection; calls that are still open are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> Stream:
        ending = Ending()
        return Stream(self._pieces(request, checked_timeout(timeout_s, self._timeout_s), ending), ending)

    def _pieces(
        self, request: inference_pb2.GenerateRequest, timeout_s: float, ending: Ending
    ) -> Generator[Piece, None, None]:
        # A generator, because Python closes one that nobody holds any more: that is what makes `break` cancel.
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for message in call:
                yield piece_from_wire(message)
            ending.take(call.trailing_metadata())
        except grpc.RpcError as error:
            raise typed_error(error, self._target, timeout_s) from None
        finally:
            call.cancel()
