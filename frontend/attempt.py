"""One dispatch of one request: a call to a prefill worker, a call to a decode worker, and their end.

An attempt owns its two calls. `close` ends both at once, from any state and without waiting; it is what makes
cancellation reach the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc.aio

from frontend.outstanding import OutstandingWork
from frontend.router import Route
from frontend.worker_channels import WorkerChannels
from frontend.worker_failure import FailureKind, WorkerFailure, failure_of
from slipstream.errors import DeadlineError, SlipstreamError, WorkerLostError
from slipstream.settings import FrontendSettings
from slipstream.v1.registry_pb2 import WorkerRecord
from slipstream.v1.sampling_pb2 import SamplingParams
from slipstream.v1.worker_pb2 import DecodeEvent, DecodeRequest, HandoffReady, PrefillEvent, PrefillRequest
from slipstream.v1.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub

Event = TypeVar("Event", PrefillEvent, DecodeEvent)
Request = TypeVar("Request", PrefillRequest, DecodeRequest)

END_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every attempt of a dispatcher shares."""

    settings: FrontendSettings
    channels: WorkerChannels
    work: OutstandingWork
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent: the prompt with whatever was already generated, and how to go on from there.

    Attributes:
        deadline_s: the clock's time at which the whole request must have ended.
    """

    request_id: str
    model: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    deadline_s: float


@dataclass(slots=True)
class _Open:
    """A call that is under way, and what ends it."""

    worker: WorkerRecord
    cancel: Callable[[], bool]


@dataclass(slots=True)
class Attempt:
    """Use: `prefill` (if the route has a prefill worker), `start_decode`, `next_tokens` until it is finished, and
    `close` in every case.

    The work is counted for both workers from the start, not from their calls: requests that arrive together must
    see each other, although the decode worker is called only after prefill.
    """

    around: Surroundings
    job: Job
    route: Route
    prefill_s: float = 0.0
    ready: HandoffReady | None = None
    _prefill: _Open | None = None
    _decode: _Open | None = None
    _decode_call: grpc.aio.UnaryStreamCall[DecodeRequest, DecodeEvent] | None = None
    _tokens_came: bool = False
    _burdened: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for worker in (self.route.prefill, self.route.decode):
            if worker is not None:
                self.around.work.begin(worker.worker_id, len(self.job.token_ids))
                self._burdened.append(worker.worker_id)

    async def prefill(self) -> None:
        """Have the prompt computed; `ready` holds the handoff afterwards. The blocks stay held until `close`
        or the first tokens.

        Raises:
            WorkerFailure: of the prefill worker, whose call has ended then.
            InvalidRequestError, DeadlineError
        """
        worker = self.route.prefill
        assert worker is not None, "this route has no prefill worker"
        job, began_s = self.job, self.around.clock()
        call: grpc.aio.UnaryStreamCall[PrefillRequest, PrefillEvent] = PrefillWorkerStub(self._acquire(worker)).Prefill(
            PrefillRequest(request_id=job.request_id, model=job.model, token_ids=job.token_ids)
        )
        self._prefill = _Open(worker, call.cancel)
        try:
            limit_s = self.around.settings.prefill_timeout_s
            event = await self._read(worker, call, began_s + limit_s, f"handoff within {limit_s:g} s")
            if event is None or not event.HasField("ready"):
                lost = WorkerLostError(f"prefill worker {worker.worker_id} closed the call without a handoff")
                raise WorkerFailure(worker, FailureKind.FAILED, lost)
        except WorkerFailure:
            self._end_prefill()
            raise
        self.ready = event.ready
        self.prefill_s = self.around.clock() - began_s
        self._unburden(worker.worker_id)

    def start_decode(self) -> None:
        """Send the request to the decode worker, with the handoff if there is one."""
        worker, job = self.route.decode, self.job
        self._decode_call = DecodeWorkerStub(self._acquire(worker)).Decode(
            DecodeRequest(
                request_id=job.request_id,
                model=job.model,
                token_ids=job.token_ids,
                sampling=job.sampling,
                handoff=self.ready.handoff if self.ready else b"",
            )
        )
        self._decode = _Open(worker, self._decode_call.cancel)

    async def next_tokens(self) -> DecodeEvent:
        """The next event that has tokens or finishes the answer.

        Raises:
            WorkerFailure: of the decode worker.
            InvalidRequestError, DeadlineError
        """
        assert self._decode is not None, "start_decode comes first"
        assert self._decode_call is not None
        settings, worker = self.around.settings, self._decode.worker
        limit_s = settings.token_timeout_s if self._tokens_came else settings.first_token_timeout_s
        until_s = self.around.clock() + limit_s
        while True:
            event = await self._read(worker, self._decode_call, until_s, f"token within {limit_s:g} s")
            if event is None:
                lost = WorkerLostError(f"decode worker {worker.worker_id} closed the call before the answer's end")
                raise WorkerFailure(worker, FailureKind.FAILED, lost)
            if event.token_ids or event.finish_reason:
                self._tokens_came = True
                # Decode has its own copy of the prompt's blocks now, or has computed them: nobody needs the others.
                self._end_prefill()
                return event

    async def await_end(self) -> None:
        """After the last event: let the worker end the call itself, so that it sees an answer and no abort."""
        assert self._decode is not None, "start_decode comes first"
        assert self._decode_call is not None
        # The answer is complete: how the call ends does not matter.
        with suppress(WorkerFailure, SlipstreamError):
            await self._read(self._decode.worker, self._decode_call, self.around.clock() + END_TIMEOUT_S, "end")

    def close(self) -> None:
        """End both calls now: what they had not finished is aborted on the workers. Never blocks, never fails."""
        self._end_prefill()
        if self._decode is not None:
            self._end(self._decode)
            self._decode = None
        for worker_id in tuple(self._burdened):
            self._unburden(worker_id)

    def _acquire(self, worker: WorkerRecord) -> grpc.aio.Channel:
        return self.around.channels.acquire(worker.address)

    def _end_prefill(self) -> None:
        if self._prefill is not None:
            self._end(self._prefill)
            self._prefill = None

    def _end(self, opened: _Open) -> None:
        opened.cancel()
        self._unburden(opened.worker.worker_id)
        self.around.channels.release(opened.worker.address)

    def _unburden(self, worker_id: str) -> None:
        if worker_id in self._burdened:
            self._burdened.remove(worker_id)
            self.around.work.end(worker_id, len(self.job.token_ids))

    async def _read(
        self,
        worker: WorkerRecord,
        call: grpc.aio.UnaryStreamCall[Request, Event],
        until_s: float,
        awaited: str,
    ) -> Event | None:
        """The call's next event, None at its regular end."""
        limit_s = min(until_s, self.job.deadline_s) - self.around.clock()
        try:
            async with asyncio.timeout(limit_s):
                event = await call.read()
        except TimeoutError as error:
            if self.around.clock() >= self.job.deadline_s:
                limit_s = self.around.settings.request_timeout_s
                raise DeadlineError(
                    f"the request took longer than frontend.request_timeout_s = {limit_s:g} s"
                ) from error
            silent = WorkerLostError(f"no {awaited}")
            raise WorkerFailure(worker, FailureKind.TIMEOUT, silent) from error
        except grpc.aio.AioRpcError as error:
            raise failure_of(worker, error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this task was cancelled but the call: its channel was closed under it.
            closed = WorkerLostError("the connection was closed")
            raise WorkerFailure(worker, FailureKind.LOST, closed) from error
        return None if event is grpc.aio.EOF else cast("Event", event)
