"""The gate before the dispatcher: asyncio around `scheduler`.

A request that finds room passes without a task, a future or a wait. One that does not waits for a future; whatever
frees room (a computed prompt, an end, the clock) gives the next ones their turn. Leaving `generate` at any point
gives up the place, in the queue or at the workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from frontend.admission.accounts import WAITING, AdmissionAccounts
from frontend.admission.claim import Priority, Stage
from frontend.admission.class_queues import QueueLimits
from frontend.admission.demand import Demand, MeanDemand
from frontend.admission.held_request import HeldRequest, PausedError
from frontend.admission.in_flight import ALONE, ClusterRoom, Others
from frontend.admission.metrics import QUEUED, AdmissionMetrics
from frontend.admission.scheduler import Policy, Scheduler
from frontend.generation import Dispatcher, ServedModel, TokenDelta, TokenRequest
from frontend.progress import Progress
from frontend.request_life import stage
from frontend.traffic_count import TRAFFIC, Queued
from slipstream import telemetry
from slipstream.errors import DeadlineError, OverloadedError, ShedError
from slipstream.settings import AdmissionSettings

log = telemetry.get_logger(__name__)

TICK_S = 0.01
"""How often the queue is looked at while there is one: predictions come true without an event."""

ROOM_PERIOD_S = 0.5
"""How old the workers' figures may be; they send them each second."""


def policy_of(settings: AdmissionSettings) -> Policy:
    """The scheduler's part of the settings."""
    by_class = {
        Priority.REALTIME: settings.realtime_queue,
        Priority.NEARLINE: settings.nearline_queue,
        Priority.BATCH: settings.batch_queue,
    }
    wait_s = {
        Priority.REALTIME: settings.realtime_wait_s,
        Priority.NEARLINE: settings.nearline_wait_s,
        Priority.BATCH: settings.batch_wait_s,
    }
    limits = QueueLimits(by_class, settings.queue, settings.aging_s)
    return Policy(limits, settings.worker_wait_s, settings.ttft_slo_s, settings.max_preemptions, wait_s)


class AdmissionGate:
    """Implements `frontend.generation.Dispatcher` in front of another one.

    Args:
        request_timeout_s: longest a request may take, when it does not say so itself.
        room: what the workers have, as far as is known now.
        others: what other frontends do, by their number; asked only where there are any.
        wall_clock: seconds since the epoch, for those who ask later what became of a request.

    Attributes:
        accounts: what became of the last requests.
    """

    def __init__(
        self,
        inner: Dispatcher,
        settings: AdmissionSettings,
        *,
        request_timeout_s: float,
        room: Callable[[], ClusterRoom],
        clock: Callable[[], float] = time.monotonic,
        others: Callable[[int], Others] | None = None,
        wall_clock: Callable[[], float] = time.time,
        demand: Demand | None = None,
    ) -> None:
        self._inner = inner
        self._request_timeout_s = request_timeout_s
        self._room = room
        self._others = others
        self._clock = clock
        self._wall_clock = wall_clock
        self.accounts = AdmissionAccounts()
        self._demand = demand or MeanDemand()
        self._preempts = settings.max_preemptions > 0
        self._room_at_s = -float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self._metrics = AdmissionMetrics(one.name for one in settings.tenants)
        self.scheduler: Scheduler[HeldRequest] = Scheduler(policy_of(settings), clock())

    @property
    def ready(self) -> bool:
        """See `Dispatcher`. A full queue is no reason not to be ready: other classes may have room."""
        return self._inner.ready

    def models(self) -> list[ServedModel]:
        """See `Dispatcher`."""
        return self._inner.models()

    def queued(self) -> dict[tuple[str, str], Queued]:
        """What waits now, by model and class."""
        found: dict[tuple[str, str], Queued] = {}
        for priority in Priority:
            for held in self.scheduler.queues.of(priority):
                one = found.setdefault((held.request.model, priority.label), Queued())
                one.requests += 1
                one.prompt_tokens += len(held.request.token_ids)
                one.oldest_wait_s = max(one.oldest_wait_s, self._clock() - held.arrived_s)
        return found

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream the answer, after a wait for room if need be.

        Raises:
            OverloadedError: there is no room, and none is to be waited for.
            DeadlineError: there was none in time.
            SlipstreamError: what the dispatcher behind raises.
        """
        held = self._hold(request)
        try:
            self._enter(held)
            if held.turn is not None:
                with stage("admission"):
                    await self._turn(held)
            stream = self._pausable(held) if held.progress is not None else self._send(held)
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    if not held.answered:
                        self._first_token(held)
                    held.note(delta)
                    yield delta
        finally:
            self._leave(held)

    async def _pausable(self, held: HeldRequest) -> AsyncGenerator[TokenDelta, None]:
        """The answer in as many parts as it takes: after a pause the rest of it is asked for."""
        while True:
            async with aclosing(self._send(held)) as deltas:
                try:
                    while True:
                        yield await held.read(deltas)
                except StopAsyncIteration:
                    return
                except PausedError:
                    pass
            self._wake(held)
            await self._turn(held)

    def _send(self, held: HeldRequest) -> AsyncGenerator[TokenDelta, None]:
        # Not kept in `held`: what refers to itself is freed late.
        return self._inner.generate(held.next_request(lambda: self._computed(held)))

    def _hold(self, request: TokenRequest) -> HeldRequest:
        now_s, claim, sampling = self._clock(), request.claim, request.sampling
        cost = self._demand.cost(
            len(request.token_ids), 0, sampling.max_tokens if sampling.HasField("max_tokens") else None
        )
        timeout_s = self._request_timeout_s
        if claim.timeout_s is not None and claim.timeout_s < timeout_s:
            timeout_s = claim.timeout_s
        held = HeldRequest(
            claim, cost.work, cost.prompt_work, cost.kv_tokens, now_s, now_s + timeout_s,
            request=request, demand=self._demand,
            account=self.accounts.open(request.request_id, claim, self._wall_clock()),
        )  # fmt: skip
        if self._preempts and claim.priority is Priority.BATCH:
            held.progress = Progress(request, 1, held.deadline_s)
        return held

    def _enter(self, held: HeldRequest) -> None:
        """Let it through, or queue it: then it has a `turn`."""
        now_s = held.arrived_s
        self._look_at_room(now_s)
        try:
            arrival = self.scheduler.arrive(held, now_s)
        except OverloadedError as error:
            self._refuse(held, error, 0.0)
            TRAFFIC.refused(held.request.model, held.claim.priority.label)
            raise
        TRAFFIC.arrived(held.request.model, held.claim.priority.label, len(held.request.token_ids))
        if arrival.admitted:
            self._admit(held, 0.0)
            return
        held.turn = asyncio.get_running_loop().create_future()
        if arrival.dropped is not None:
            self._shed(arrival.dropped, now_s)
        self._pump()

    async def _turn(self, held: HeldRequest) -> None:
        """Wait for it.

        Raises:
            ShedError, DeadlineError
        """
        assert held.turn is not None, "not queued"
        left_s = held.deadline_s - self._clock()
        try:
            async with asyncio.timeout(left_s):
                error = await held.turn
        except TimeoutError as timeout:
            allowed_s = held.deadline_s - held.arrived_s
            late = DeadlineError(
                f"the request waited for its turn for all of the {allowed_s:g} s that it may take "
                "(x-request-timeout-s, frontend.request_timeout_s)"
            )
            if held.account.state == WAITING:
                held.account.refused(late, self._clock() - held.queued_s, self._wall_clock())
            raise late from timeout
        if error is not None:
            raise error

    def _admit(self, held: HeldRequest, waited_s: float) -> None:
        self._metrics.admitted(held.claim, waited_s)
        held.account.admitted(waited_s, self._wall_clock())

    def _refuse(self, held: HeldRequest, error: OverloadedError, waited_s: float) -> None:
        self._metrics.refused(held.claim, error.code)
        held.account.refused(error, waited_s, self._wall_clock())
        self.accounts.refused(held.account)

    def _shed(self, held: HeldRequest, now_s: float) -> None:
        TRAFFIC.shed(held.request.model, held.claim.priority.label)
        full = self.scheduler.full(held, now_s)
        error = ShedError(f"it gave way to another request: {full.message}", retry_after_s=full.retry_after_s)
        self._refuse(held, error, now_s - held.queued_s)
        assert held.turn is not None, "not queued"
        if not held.turn.done():
            held.turn.set_result(error)

    def _computed(self, held: HeldRequest) -> None:
        self.scheduler.computed(held, self._clock())
        if len(self.scheduler.queues):
            self._pump()

    def _first_token(self, held: HeldRequest) -> None:
        self.scheduler.first_token(held, self._clock())
        if len(self.scheduler.queues):
            self._pump()

    def _leave(self, held: HeldRequest) -> None:
        if held.stage is Stage.QUEUED and held.account.state == WAITING:
            held.account.left(self._clock() - held.queued_s, self._wall_clock())
        self._wake(held)
        waited = len(self.scheduler.queues) > 0
        self.scheduler.end(held, self._clock())
        if waited:
            self._pump()

    def _pump(self) -> None:
        """Do what the scheduler says."""
        loop, now_s = asyncio.get_running_loop(), self._clock()
        self._look_at_room(now_s)
        step = self.scheduler.step(now_s)
        for held in step.preempted:
            held.pause(loop)
            self._metrics.preempted(held.claim)
            held.account.preempted(self._wall_clock())
            log.info("request_preempted", request_id=held.request.request_id, tokens=held.tokens)
        for held in step.granted:
            self._admit(held, now_s - held.queued_s)
            if step.preempted and held not in step.preempted:
                # Its place is not free before the other has left it: the router would take all workers for full.
                step.preempted[-1].successors.append(held)
            else:
                _give_turn(held)
        for priority in Priority:
            QUEUED.labels(priority.label).set(len(self.scheduler.queues.of(priority)))
        if len(self.scheduler.queues) and self._timer is None:
            self._timer = loop.call_later(TICK_S, self._tick)

    def _wake(self, held: HeldRequest) -> None:
        """It has left the workers: those that were granted its place may go there."""
        for successor in held.successors:
            _give_turn(successor)
        held.successors.clear()

    def _tick(self) -> None:
        # Set again by `_pump` as long as somebody waits, and whoever waits has a task that ends or leaves.
        self._timer = None
        self._pump()

    def _look_at_room(self, now_s: float) -> None:
        if now_s - self._room_at_s >= ROOM_PERIOD_S or not self.scheduler.in_flight.room.decode_workers:
            self._room_at_s = now_s
            self.scheduler.take_room(self._room(), now_s)
        frontends = self.scheduler.in_flight.room.frontends
        if self._others is not None and (frontends > 1 or self.scheduler.in_flight.others is not ALONE):
            self.scheduler.take_others(self._others(frontends) if frontends > 1 else ALONE, now_s)


def _give_turn(held: HeldRequest) -> None:
    if held.turn is not None and not held.turn.done():
        held.turn.set_result(None)
