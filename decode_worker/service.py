"""The gRPC service of a decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from engine.admission import Admission, check_model
from engine.observed_call import ObservedCall
from engine.protocol import Engine, TokensGenerated
from slipstream import grpc_errors
from slipstream.errors import SlipstreamError
from slipstream.v1.worker_pb2 import DecodeEvent, DecodeRequest
from slipstream.v1.worker_pb2_grpc import DecodeWorkerServicer

# Tokens that come faster than this travel together. Each message costs both sides some 0.1 ms of CPU time, and nobody
# reads 200 of them a second; engines whose steps take longer never notice.
MERGE_WITHIN_S = 0.005


class DecodeService(DecodeWorkerServicer):
    """Generates tokens; cancelling a call aborts its request.

    Args:
        merge_within_s: least time between two messages of one call. The first tokens never wait, and an engine hands
            over together what its reader has not fetched meanwhile.
    """

    def __init__(
        self, engine: Engine, admission: Admission, *, model: str, merge_within_s: float = MERGE_WITHIN_S
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._model = model
        self._merge_within_s = merge_within_s

    async def Decode(  # noqa: N802 - gRPC's name
        self, request: DecodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[DecodeEvent]:
        call = ObservedCall("DecodeWorker/Decode", request.request_id, context)
        try:
            with self._admission.admitted():
                check_model(request.model, self._model)
                handoff = request.handoff if request.HasField("handoff") else None
                stream = self._engine.decode(request.request_id, request.token_ids, request.sampling, handoff)
                work = self._admission.work.begun(
                    request.frontend_id, request.token_ids, computes=handoff is None, generates=True
                )
                with work as begun:
                    async with aclosing(stream):
                        async for tokens in stream:
                            begun.generated(len(tokens.token_ids))
                            if tokens.finish_reason:
                                call.generated(tokens)
                            yield _event(tokens)
                            if not tokens.finish_reason:
                                await asyncio.sleep(self._merge_within_s)
        except SlipstreamError as error:
            call.fail(error.code)
            await grpc_errors.abort(context, error)
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
