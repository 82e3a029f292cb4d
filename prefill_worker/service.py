"""The gRPC service of a prefill worker.

A call is the owner of a lease: blocks are held while it is open, renewed while it lives, and released when it
ends, whatever the reason. A frontend that dies takes its calls with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import grpc.aio

from engine.admission import Admission, check_model
from engine.protocol import Engine, PromptComputed
from kv_transfer.board import Outcome
from kv_transfer.leases import Lease, LeaseTable
from slipstream import grpc_errors
from slipstream.errors import EngineDeadError, InvalidRequestError, SlipstreamError
from slipstream.v1.worker_pb2 import HandoffClosed, HandoffReady, PrefillEvent, PrefillRequest
from slipstream.v1.worker_pb2_grpc import PrefillWorkerServicer

# How often an open call looks whether its lease has ended: the caller does not wait for this.
_OUTCOME_POLL_S = 0.02

_CLOSED = {
    Outcome.TAKEN: HandoffClosed.TAKEN,
    Outcome.RELEASED: HandoffClosed.RELEASED,
    Outcome.EXPIRED: HandoffClosed.EXPIRED,
    Outcome.ABORTED: HandoffClosed.RELEASED,
}


class PrefillService(PrefillWorkerServicer):
    """Computes prompts.

    Args:
        lease_s: how long blocks stay when this process cannot renew the lease.
    """

    def __init__(self, engine: Engine, leases: LeaseTable, admission: Admission, *, model: str, lease_s: float) -> None:
        self._engine = engine
        self._leases = leases
        self._admission = admission
        self._model = model
        self._lease_s = lease_s

    async def Prefill(  # noqa: N802 - gRPC's name
        self, request: PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[PrefillEvent]:
        try:
            with self._admission.admitted(), self._leased() as lease:
                check_model(request.model, self._model)
                computed = await self._compute(request, lease)
                yield PrefillEvent(
                    ready=HandoffReady(
                        handoff=computed.handoff,
                        computed_tokens=computed.computed_tokens,
                        cached_tokens=computed.cached_tokens,
                    )
                )
                outcome = await self._until_ended(lease) if computed.handoff else Outcome.RELEASED
                yield PrefillEvent(closed=HandoffClosed(outcome=_CLOSED[outcome]))
        except SlipstreamError as error:
            await grpc_errors.abort(context, error)

    async def _compute(self, request: PrefillRequest, lease: Lease) -> PromptComputed:
        """Compute the prompt; whatever happens after the engine may know of the lease, the board will tell."""
        lease.seen_by_engine = True
        try:
            return await self._engine.prefill(request.request_id, request.token_ids, (lease.slot, lease.nonce))
        except (InvalidRequestError, EngineDeadError):
            lease.seen_by_engine = False  # refused before it got there, or there is no engine any more
            raise

    async def _until_ended(self, lease: Lease) -> Outcome:
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + self._lease_s / 3
        while (outcome := self._leases.outcome(lease)) is None:
            await asyncio.sleep(_OUTCOME_POLL_S)
            if loop.time() >= renew_at:
                self._leases.renew(lease)
                renew_at = loop.time() + self._lease_s / 3
        return outcome

    @contextmanager
    def _leased(self) -> Any:
        lease = self._leases.open()
        try:
            yield lease
        finally:
            self._leases.close(lease)
