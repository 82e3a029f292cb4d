"""The gRPC service that hands prompts over: computed here, or what is in the prefix cache.

A call is the owner of a lease: blocks are held while it is open, renewed while it lives, and released when it
ends, whatever the reason. A frontend that dies takes its calls with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc.aio

from engine.admission import Admission, check_model
from engine.observed_call import ObservedCall
from engine.open_work import OpenRequest
from engine.protocol import Engine, PromptComputed
from engine.request_stream import RequestStream, serving
from kv_transfer.board import Outcome
from kv_transfer.handoff import ID_BYTES
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.permits import TOKEN_BYTES, Permit
from slipstream.errors import EngineDeadError, InvalidRequestError, SlipstreamError
from slipstream.v1 import worker_pb2
from slipstream.v1.worker_pb2 import HandoffClosed, PrefillCommands, PrefillEvent, PrefillEvents, PrefillRequest
from slipstream.v1.worker_pb2_grpc import PrefillWorkerServicer

# How often an open call looks whether its lease has ended: the caller does not wait for this.
_OUTCOME_POLL_S = 0.02

_CLOSED = {
    Outcome.TAKEN: HandoffClosed.TAKEN,
    Outcome.RELEASED: HandoffClosed.RELEASED,
    Outcome.EXPIRED: HandoffClosed.EXPIRED,
    Outcome.ABORTED: HandoffClosed.RELEASED,
    Outcome.NOT_CACHED: HandoffClosed.NOT_CACHED,
}


class PrefillService(PrefillWorkerServicer):
    """Hands prompts over.

    Args:
        lease_s: how long blocks stay when this process cannot renew the lease.
    """

    def __init__(
        self,
        engine: Engine,
        leases: LeaseTable,
        admission: Admission,
        *,
        model: str,
        lease_s: float,
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._admission = admission
        self._model = model
        self._lease_s = lease_s

    async def PrefillMany(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[PrefillCommands], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[PrefillEvents]:
        stream = RequestStream(self.prefill, PrefillEvent)
        async with serving(stream, request_iterator, self._admission.over) as messages:
            async for events in messages:
                yield PrefillEvents(events=events)

    async def prefill(self, request: PrefillRequest) -> AsyncGenerator[PrefillEvent, None]:
        """One request.

        Raises:
            SlipstreamError: it is refused, or failed.
        """
        call = ObservedCall("PrefillWorker/Prefill", request.request_id, request.trace)
        try:
            with self._admission.admitted(), self._leased() as lease, self._begun(request) as begun:
                self._check(request)
                keeping = asyncio.create_task(self._until_ended(lease), name="lease")
                try:
                    computed = await self._compute(request, lease, keeping)
                    begun.computed()
                    if computed is not None:
                        call.computed(computed)
                        yield PrefillEvent(computed=_to_wire(computed))
                    outcome = await keeping
                    call.handed_over(outcome.name.lower())
                    yield PrefillEvent(closed=HandoffClosed(outcome=_CLOSED[outcome]))
                finally:
                    await _end(keeping)
        except SlipstreamError as error:
            call.fail(error.code)
            raise
        finally:
            call.end()

    def _begun(self, request: PrefillRequest) -> AbstractContextManager[OpenRequest]:
        return self._admission.work.begun(
            request.frontend_id,
            request.token_ids,
            computes=not request.cached_only,
            generates=False,
            cache_salt=request.cache_salt,
        )

    def _check(self, request: PrefillRequest) -> None:
        """Refuse what cannot be meant.

        Raises:
            ModelNotFoundError, InvalidRequestError
        """
        check_model(request.model, self._model)
        if len(request.handoff_id) != ID_BYTES:
            raise InvalidRequestError(
                f"handoff_id: {len(request.handoff_id)} bytes, it has {ID_BYTES} random ones", param="handoff_id"
            )
        if len(request.handoff_token) != TOKEN_BYTES:
            raise InvalidRequestError(
                f"handoff_token: {len(request.handoff_token)} bytes, it has {TOKEN_BYTES} random ones",
                param="handoff_token",
            )

    async def _compute(
        self, request: PrefillRequest, lease: Lease, keeping: asyncio.Task[Outcome]
    ) -> PromptComputed | None:
        """Have the prompt computed; None when its lease ended instead.

        Whatever happens after the engine may know of the lease, the board will tell.
        """
        computing = asyncio.create_task(self._engine_prefill(request, lease), name="prefill")
        awaited: set[asyncio.Task[Any]] = {computing, keeping} if request.cached_only else {computing}
        try:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            return computing.result() if computing.done() else None
        except (InvalidRequestError, EngineDeadError):
            lease.seen_by_engine = False  # refused before it got there, or there is no engine any more
            raise
        finally:
            await _end(computing)

    async def _engine_prefill(self, request: PrefillRequest, lease: Lease) -> PromptComputed:
        lease.seen_by_engine = True
        return await self._engine.prefill(
            request.request_id,
            request.token_ids,
            (lease.slot, lease.nonce),
            permit=Permit(request.handoff_id, request.handoff_token, request.receiver_key),
            source=request.source if request.HasField("source") else None,
            cached_only=request.cached_only,
            cache_salt=request.cache_salt,
        )

    async def _until_ended(self, lease: Lease) -> Outcome:
        """Renew the lease until it ends in another way."""
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + self._lease_s / 3
        while (outcome := self._leases.outcome(lease)) is None:
            await asyncio.sleep(_OUTCOME_POLL_S)
            if loop.time() >= renew_at:
                self._leases.renew(lease)
                renew_at = loop.time() + self._lease_s / 3
        return outcome

    @contextmanager
    def _leased(self) -> Iterator[Lease]:
        lease = self._leases.open()
        try:
            yield lease
        finally:
            self._leases.close(lease)


def _to_wire(computed: PromptComputed) -> worker_pb2.PromptComputed:
    return worker_pb2.PromptComputed(
        computed_tokens=computed.computed_tokens,
        cached_tokens=computed.cached_tokens,
        received_tokens=computed.received_tokens,
    )


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task that is not needed any more, and see it end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
