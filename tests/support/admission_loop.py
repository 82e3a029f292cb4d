"""A cluster in virtual time under the real scheduler: prompts one after the other on each prefill worker, then tokens.

No thread, no clock, no chance but the seed's: what a test finds here it finds in every run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from frontend.admission.claim import Claim, Entry, Priority, Stage
from frontend.admission.class_queues import QueueLimits
from frontend.admission.in_flight import ClusterRoom, Others
from frontend.admission.scheduler import Arrival, Policy, Scheduler
from slipstream.errors import OverloadedError

TICK_S = 0.01
FEED_S = 0.02
"""After which frontends hear of each other's prompts."""


def policy(
    *,
    each: int = 1000,
    total: int = 3000,
    aging_s: float = 10.0,
    worker_wait_s: float = 0.02,
    ttft_slo_s: float = 2.0,
    max_preemptions: int = 2,
    wait_s: float = math.inf,
) -> Policy:
    limits = QueueLimits(dict.fromkeys(Priority, each), total, aging_s)
    return Policy(limits, worker_wait_s, ttft_slo_s, max_preemptions, dict.fromkeys(Priority, wait_s))


@dataclass(slots=True, eq=False)
class Job(Entry):
    """A request with its true costs."""

    prefill_s: float = 0.1
    decode_s: float = 0.2
    first_token_at_s: float | None = None
    refused: OverloadedError | None = None
    dropped: bool = False
    sends: int = 0
    frontend: int = 0

    @property
    def ttft_s(self) -> float:
        assert self.first_token_at_s is not None, "it was never answered"
        return self.first_token_at_s - self.arrived_s


def job(
    at_s: float,
    tenant: str = "a",
    priority: Priority = Priority.REALTIME,
    *,
    weight: float = 1.0,
    work: float = 4000.0,
    timeout_s: float = 1e6,
    prefill_s: float = 0.1,
    decode_s: float = 0.2,
) -> Job:
    return Job(
        claim=Claim(priority, tenant, weight),
        work=work,
        prompt_work=work,
        kv_tokens=work,
        arrived_s=at_s,
        deadline_s=at_s + timeout_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


@dataclass
class Loop:
    """Runs jobs to their ends. `transfer_s` passes between a computed prompt and its first token.

    Attributes:
        others: schedulers of further frontends, which share the workers; see `Job.frontend`.
    """

    scheduler: Scheduler[Job]
    prefill_workers: int = 1
    places: int = 1000
    transfer_s: float = 0.0
    now_s: float = 0.0
    most_in_flight: int = 0
    most_computing: int = 0
    preempted: list[Job] = field(default_factory=list)
    granted: list[Job] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0
    _ticking: bool = False
    _free_at_s: list[float] = field(default_factory=list)
    others: Sequence[Scheduler[Job]] = ()
    _computing: dict[Job, int] = field(default_factory=dict)

    @property
    def schedulers(self) -> list[Scheduler[Job]]:
        return [self.scheduler, *self.others]

    def run(self, jobs: Iterable[Job], *, until_s: float = 1e9) -> None:
        room = ClusterRoom(self.prefill_workers, 1, self.places, frontends=len(self.schedulers))
        for scheduler in self.schedulers:
            scheduler.take_room(room, 0.0)
        self._free_at_s = [0.0] * self.prefill_workers
        for one in jobs:
            self._at(one.arrived_s, lambda one=one: self._arrive(one))  # type: ignore[misc]
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
            for scheduler in self.schedulers:
                if len(scheduler.queues):
                    self._step(scheduler)
                    if len(scheduler.queues) and not self._ticking:
                        self._ticking = True
                        self._at(self.now_s + TICK_S, self._tick)

    def _tell(self) -> None:
        for number, scheduler in enumerate(self.schedulers):
            foreign = {worker for one, worker in self._computing.items() if one.frontend != number}
            scheduler.take_others(Others(len(self.schedulers), len(foreign)), self.now_s)

    def _tick(self) -> None:
        self._ticking = False

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, event))

    def _arrive(self, one: Job) -> None:
        try:
            arrival: Arrival[Job] = self.schedulers[one.frontend].arrive(one, self.now_s)
        except OverloadedError as error:
            one.refused = error
            return
        if arrival.dropped is not None:
            arrival.dropped.dropped = True
        if arrival.admitted:
            self._send(one)

    def _step(self, scheduler: Scheduler[Job]) -> None:
        step = scheduler.step(self.now_s)
        self.preempted += step.preempted
        for one in step.preempted:
            one.sends += 1  # what was under way for it means nothing any more
        for one in step.granted:
            self._send(one)

    def _send(self, one: Job) -> None:
        self.granted.append(one)
        one.sends += 1
        sent = one.sends
        self.most_in_flight = max(self.most_in_flight, self.scheduler.in_flight.open)
        worker = min(range(self.prefill_workers), key=self._free_at_s.__getitem__)
        self._free_at_s[worker] = max(self.now_s, self._free_at_s[worker]) + one.prefill_s
        self._at(self._free_at_s[worker], lambda: self._computed(one, sent))
        self._computing[one] = worker
        self.most_computing = max(self.most_computing, len(self._computing))
        if self.others:
            self._at(self.now_s + FEED_S, self._tell)

    def _computed(self, one: Job, sent: int) -> None:
        if one.sends == sent:
            self.schedulers[one.frontend].computed(one, self.now_s)
            del self._computing[one]
            if self.others:
                self._at(self.now_s + FEED_S, self._tell)
            self._at(self.now_s + self.transfer_s, lambda: self._first_token(one, sent))

    def _first_token(self, one: Job, sent: int) -> None:
        if one.sends != sent:
            return
        one.tokens += 1
        if one.first_token_at_s is None:
            one.first_token_at_s = self.now_s
        self.schedulers[one.frontend].first_token(one, self.now_s)
        self._at(self.now_s + one.decode_s, lambda: self._end(one, sent))

    def _end(self, one: Job, sent: int) -> None:
        if one.sends == sent:
            self.schedulers[one.frontend].end(one, self.now_s)
            assert one.stage is Stage.GONE


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
