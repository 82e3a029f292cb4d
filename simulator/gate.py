"""Admission in virtual time: the live frontend's scheduler of requests, driven by events in place of asyncio.

What `frontend.admission.gate` does with futures and tasks is done here with calls. The decisions are the same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from frontend.admission.claim import Entry, Priority, Stage
from frontend.admission.demand import MeanDemand
from frontend.admission.gate import ROOM_PERIOD_S, TICK_S, policy_of
from frontend.admission.in_flight import ClusterRoom, Others
from frontend.admission.scheduler import Scheduler
from simulator.event_loop import EventLoop
from slipstream.errors import OverloadedError, ShedError, SlipstreamError
from slipstream.settings import AdmissionSettings

if TYPE_CHECKING:
    from simulator.underway import Underway


class Behind(Protocol):
    """What is behind the gate."""

    def send(self, under: Underway) -> None:
        """Dispatch it to workers, for the first time or after it was taken back."""
        ...

    def take_back(self, under: Underway) -> None:
        """Take it from the workers."""
        ...

    def refuse(self, under: Underway, error: SlipstreamError) -> None:
        """It is turned away."""
        ...


class SimulatedGate:
    """One frontend's gate. The cluster calls it as things happen to its requests.

    Args:
        room: what the workers have, as far as is known now.
    """

    __slots__ = (
        "_again",
        "_behind",
        "_demand",
        "_loop",
        "_others",
        "_pumping",
        "_room",
        "_room_at_s",
        "_ticking",
        "queued_tokens",
        "scheduler",
    )

    def __init__(
        self,
        settings: AdmissionSettings,
        loop: EventLoop,
        behind: Behind,
        room: Callable[[], ClusterRoom],
        others: Callable[[], Others] | None = None,
    ) -> None:
        self._loop = loop
        self._behind = behind
        self._room = room
        self._others = others
        self._room_at_s = -float("inf")
        self._demand = MeanDemand()
        self._again = self._pumping = self._ticking = False
        self.queued_tokens: Counter[Priority] = Counter()
        """Prompt tokens that wait here, by class."""
        self.scheduler: Scheduler[Underway] = Scheduler(policy_of(settings), loop.now_s)

    def count(self, under: Underway) -> None:
        """Make its costs those of what is left of it."""
        cost = self._demand.cost(under.journey.arrival.input_tokens, under.tokens + under.attempt_tokens, None)
        under.work, under.prompt_work, under.kv_tokens = cost.work, cost.prompt_work, cost.kv_tokens

    def arrive(self, under: Underway) -> None:
        """A new request: it is sent, queued or refused."""
        now_s = self._loop.now_s
        self.count(under)
        self._look_at_room(now_s)
        try:
            arrival = self.scheduler.arrive(under, now_s)
        except OverloadedError as error:
            self._behind.refuse(under, error)
            return
        if arrival.admitted:
            self._behind.send(under)
            return
        self._wait(under, 1)
        if arrival.dropped is not None:
            self._wait(arrival.dropped, -1)
            full = self.scheduler.full(arrival.dropped, now_s)
            self._behind.refuse(arrival.dropped, ShedError(full.message, retry_after_s=full.retry_after_s))
        self._pump()

    def computed(self, under: Underway) -> None:
        """Its prompt is computed."""
        if under.stage is Stage.PREFILL:
            self.scheduler.computed(under, self._loop.now_s)
            if len(self.scheduler.queues):
                self._pump()

    def first_token(self, under: Underway) -> None:
        """The first token came since it was sent."""
        self.scheduler.first_token(under, self._loop.now_s)
        if len(self.scheduler.queues):
            self._pump()

    def leave(self, under: Underway, answer_tokens: int = 0) -> None:
        """The request is over, wherever it was; `answer_tokens` when it was answered to its end."""
        if answer_tokens:
            self._demand.note_answer(answer_tokens)
        if under.stage is Stage.QUEUED:
            self._wait(under, -1)
        waited = len(self.scheduler.queues) > 0
        self.scheduler.end(under, self._loop.now_s)
        if waited:
            self._pump()

    def queued(self, priority: Priority) -> tuple[int, int, float]:
        """Requests of a class that wait, their prompt tokens, and for how long the first of them has waited."""
        queue = self.scheduler.queues.of(priority)
        oldest_s = self._loop.now_s - _oldest(queue.oldest()) if len(queue) else 0.0
        return len(queue), self.queued_tokens[priority], oldest_s

    def _pump(self) -> None:
        """Do what the scheduler says, until nothing of it changes that any more.

        A request that cannot be sent leaves at once and calls this again: in turn, not ever deeper.
        """
        self._again = True
        if self._pumping:
            return
        self._pumping = True
        while self._again:
            self._again = False
            self._step(self._loop.now_s)
        self._pumping = False

    def _step(self, now_s: float) -> None:
        self._look_at_room(now_s)
        step = self.scheduler.step(now_s)
        for under in step.preempted:
            self._wait(under, 1)
            self._behind.take_back(under)
        for under in step.granted:
            self._wait(under, -1)
            self._behind.send(under)
        if len(self.scheduler.queues) and not self._ticking:
            self._ticking = True
            self._loop.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        if len(self.scheduler.queues):
            self._pump()

    def _wait(self, under: Underway, more: int) -> None:
        self.queued_tokens[under.claim.priority] += more * under.journey.arrival.input_tokens

    def _look_at_room(self, now_s: float) -> None:
        if now_s - self._room_at_s >= ROOM_PERIOD_S or not self.scheduler.in_flight.room.decode_workers:
            self._room_at_s = now_s
            self.scheduler.take_room(self._room(), now_s)
        if self._others is not None:
            self.scheduler.take_others(self._others(), now_s)


def _oldest(entry: Entry) -> float:
    return entry.queued_s
