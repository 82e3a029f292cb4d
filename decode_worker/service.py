"""The gRPC service of a decode worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from engine.admission import Admission, check_model
from engine.observed_call import ObservedCall
from engine.protocol import Engine, TokensGenerated
from engine.request_stream import MERGE_WITHIN_S, RequestStream, serving
from slipstream.errors import SlipstreamError
from slipstream.v1.worker_pb2 import DecodeCommands, DecodeEvent, DecodeEvents, DecodeRequest
from slipstream.v1.worker_pb2_grpc import DecodeWorkerServicer


class DecodeService(DecodeWorkerServicer):
    """Generates tokens; cancelling a call aborts its request.

    Args:
        merge_within_s: least time between two messages of one stream; see `engine.request_stream`.
    """

    def __init__(
        self, engine: Engine, admission: Admission, *, model: str, merge_within_s: float = MERGE_WITHIN_S
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._model = model
        self._merge_within_s = merge_within_s

    async def DecodeMany(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[DecodeCommands], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[DecodeEvents]:
        stream = RequestStream(self.decode, DecodeEvent, merge_within_s=self._merge_within_s)
        async with serving(stream, request_iterator, self._admission.over) as messages:
            async for events in messages:
                yield DecodeEvents(events=events)

    async def decode(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        """One request.

        Raises:
            SlipstreamError: it is refused, or failed.
        """
        call = ObservedCall("DecodeWorker/Decode", request.request_id, request.trace)
        try:
            with self._admission.admitted():
                check_model(request.model, self._model)
                handoff = request.handoff if request.HasField("handoff") else None
                salt = request.cache_salt
                stream = self._engine.decode(
                    request.request_id, request.token_ids, request.sampling, handoff, cache_salt=salt
                )
                work = self._admission.work.begun(
                    request.frontend_id, request.token_ids, computes=handoff is None, generates=True, cache_salt=salt
                )
                with work as begun:
                    async with aclosing(stream):
                        async for tokens in stream:
                            begun.generated(len(tokens.token_ids))
                            if tokens.finish_reason:
                                call.generated(tokens)
                            yield _event(tokens)
        except SlipstreamError as error:
            call.fail(error.code)
            raise
        finally:
            call.end()


def _event(tokens: TokensGenerated) -> DecodeEvent:
    return DecodeEvent(
        token_ids=tokens.token_ids,
        logprobs=tokens.logprobs,
        finish_reason=tokens.finish_reason,
        stop_reason=tokens.stop_reason,
        account=tokens.account,
    )
