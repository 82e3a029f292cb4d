"""Who is let through, who waits, who is refused and who is taken back: all decisions of admission. Pure.

    arrive -> admitted, or queued (and who was dropped for it); step -> granted, preempted; computed, first_token, end

The caller acts on what it is told, and calls `step` whenever something has ended or some time has passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from frontend.admission.appointments import Appointments
from frontend.admission.claim import Entry, Priority, Stage
from frontend.admission.class_queues import AGED_SHARE, ClassQueues, QueueLimits
from frontend.admission.in_flight import Bottleneck, ClusterRoom, InFlight, Others
from frontend.admission.lately import LATELY_S, Decaying
from slipstream.errors import DeadlineUnreachableError, LongWaitError, QueueFullError

E = TypeVar("E", bound=Entry)

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 3600.0
PACE_DECAY = 0.98
"""What earlier grants weigh in the pace of the queue after each newer one."""

EXPECTED_WAIT = 2.0
"""Who was told to come back may wait so many times as long as others of the class."""

SLO_SHARE = 0.5
"""The SLO is at risk when this share of it is spent on waiting, or less where the workers need more of it. So long may
wait at the workers what is of one tenant and class alone."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is set.

    Attributes:
        ttft_slo_s: time to first token that realtime requests shall have.
        max_preemptions: times one batch request may be sent back.
        wait_s: predicted wait up to which a request of each class is queued.
    """

    limits: QueueLimits
    worker_wait_s: float
    ttft_slo_s: float
    max_preemptions: int
    wait_s: Mapping[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, math.inf))


@dataclass(slots=True)
class Step(Generic[E]):
    """What is to be done now: requests to send to the workers, and those to take from them (they are queued again)."""

    granted: list[E] = field(default_factory=list)
    preempted: list[E] = field(default_factory=list)


@dataclass(slots=True)
class Arrival(Generic[E]):
    """What became of a new request: let through or queued, and who was dropped for it."""

    admitted: bool
    dropped: E | None = None


class _Pace:
    """Work that leaves the queue in a second while there is one: whatever the workers lack, this shows it."""

    def __init__(self) -> None:
        self._work, self._seconds, self.last_s = 0.0, 0.0, 0.0

    def began(self, now_s: float, assumed: float) -> None:
        """There is a queue from now on. What is assumed counts as a first second of experience."""
        self.last_s = now_s
        if not self._seconds:
            self._work, self._seconds = assumed, 1.0

    def left(self, work: float, now_s: float) -> None:
        self._work = PACE_DECAY * self._work + work
        self._seconds = PACE_DECAY * self._seconds + now_s - self.last_s
        self.last_s = now_s

    def of(self, now_s: float, assumed: float) -> float:
        """Work a second. A queue that stands still is slow."""
        if not self._seconds:
            return assumed
        return self._work / (self._seconds + max(0.0, now_s - self.last_s))


class Scheduler(Generic[E]):
    """See the module. `now_s` never goes backwards."""

    def __init__(self, policy: Policy, now_s: float) -> None:
        self.policy = policy
        self.queues: ClassQueues[E] = ClassQueues(policy.limits)
        self.in_flight: InFlight[E] = InFlight(policy.worker_wait_s, SLO_SHARE * policy.ttft_slo_s, now_s)
        self.appointments = Appointments()
        self._pace = _Pace()
        self._pace_of = {one: _Pace() for one in Priority}
        self._sent = {one: Decaying(now_s) for one in Priority}

    def take_room(self, room: ClusterRoom, now_s: float) -> None:
        """The workers' newer figures; call it before the first request, and once in a while."""
        self.in_flight.take(room, now_s)

    def take_others(self, others: Others, now_s: float) -> None:
        """What other frontends do now; see `Others`."""
        self.in_flight.take_others(others, now_s)

    def arrive(self, entry: E, now_s: float) -> Arrival[E]:
        """A new request. Whoever gets `admitted` goes on at once; after any other answer call `step`.

        Raises:
            QueueFullError: there is no room in the queue for one like this.
            LongWaitError: it would wait for longer than its class may.
            DeadlineUnreachableError: its deadline would come before its turn.
        """
        self.in_flight.company.came(entry, now_s)
        expected = self.appointments.is_due(entry, now_s)
        if not len(self.queues) and self.in_flight.bottleneck(now_s) is None:
            self.appointments.no_queue(entry.claim)
            self._begin(entry, now_s)
            if expected:
                self.appointments.kept(entry, now_s)
            return Arrival(admitted=True)
        self._check_wait(entry, expected, now_s)
        wait_s = self.wait_s(entry, now_s)
        left_s = entry.deadline_s - now_s
        if wait_s > left_s:
            raise DeadlineUnreachableError(
                f"the predicted wait of {wait_s:.1f} s is longer than the {left_s:.1f} s that the request may take; "
                "allow it more time (x-request-timeout-s), or try again later",
                retry_after_s=_retry_after(wait_s),
            )
        if not len(self.queues):
            self._pace.began(now_s, self.in_flight.work_per_s)
        own = self.queues.of(entry.claim.priority)
        if not len(own):
            self._pace_of[entry.claim.priority].began(now_s, self._left_by_higher(entry.claim.priority, now_s))
        offer = self.queues.offer(entry, expected=expected)
        if not offer.queued:
            raise self.full(entry, now_s)
        if expected:
            self.appointments.kept(entry, now_s)
        entry.stage, entry.queued_s = Stage.QUEUED, now_s
        if offer.dropped is not None:
            offer.dropped.stage = Stage.GONE
        return Arrival(admitted=False, dropped=offer.dropped)

    def full(self, entry: E, now_s: float) -> QueueFullError:
        """What is said to one for whom the queue has no room."""
        name, limits = entry.claim.priority.label, self.policy.limits
        waiting, allowed = len(self.queues.of(entry.claim.priority)), limits.by_class[entry.claim.priority]
        return QueueFullError(
            f"the queue is full: {waiting} of {allowed} {name} requests (admission.{name}_queue) and "
            f"{len(self.queues)} of {limits.total} in all (admission.queue) are waiting; try again later",
            retry_after_s=self._come_back_s(entry, 0.0, now_s),
        )

    def _check_wait(self, entry: E, expected: bool, now_s: float) -> None:
        """Whether it would wait for too long. One at a time of each tenant and class always may wait."""
        limit_s = self.policy.wait_s[entry.claim.priority]
        turn_s = self.turn_s(entry, now_s)
        if turn_s <= limit_s * (EXPECTED_WAIT if expected else 1.0):
            return
        name = entry.claim.priority.label
        raise LongWaitError(
            f"its turn would come in {turn_s:.1f} s, and {name} requests wait for up to {limit_s:g} s "
            f"(admission.{name}_wait_s); come back when Retry-After says",
            retry_after_s=self._come_back_s(entry, turn_s - limit_s, now_s),
        )

    def _come_back_s(self, entry: E, room_in_s: float, now_s: float) -> float:
        """What a refused client is told."""
        priority, tenant = entry.claim.priority, entry.claim.tenant
        weights = self.queues.of(priority).weights() | {tenant: entry.claim.weight}
        pace = self._class_pace(priority, now_s) * entry.claim.weight / sum(weights.values())
        took_s = entry.work / pace
        earliest_s = max(room_in_s, took_s, MIN_RETRY_AFTER_S)
        return _retry_after(self.appointments.give(entry, earliest_s, took_s, now_s))

    def turn_s(self, entry: E, now_s: float) -> float:
        """Predicted time until its turn would come, were it queued now: what waits before it in its class, at the pace
        at which its class gets its turns, and what waits above."""
        priority = entry.claim.priority
        before = self.queues.of(priority).work_before(entry)
        above = sum(self.queues.of(one).work for one in Priority if one < priority)
        pace = self._pace.of(now_s if len(self.queues) else self._pace.last_s, self.in_flight.work_per_s)
        return before / self._class_pace(priority, now_s) + above / pace

    def _class_pace(self, priority: Priority, now_s: float) -> float:
        pace = self._pace_of[priority]
        return pace.of(now_s if len(self.queues.of(priority)) else pace.last_s, self._left_by_higher(priority, now_s))

    def _left_by_higher(self, priority: Priority, now_s: float) -> float:
        """Work a second that higher classes leave, by what they had lately; an aged class gets its share at least."""
        whole = self.in_flight.work_per_s
        higher = sum(self._sent[one].of(now_s) for one in Priority if one < priority) / LATELY_S
        return max(AGED_SHARE * whole, whole - higher)

    def _begin(self, entry: E, now_s: float) -> None:
        self._sent[entry.claim.priority].add(entry.work, now_s)
        self.in_flight.begin(entry, now_s)

    def step(self, now_s: float) -> Step[E]:
        """Fill the room that there is; take one batch request back where the SLO of a realtime one is at risk."""
        step: Step[E] = Step()
        self._fill(step, now_s)
        victim = self._victim(now_s)
        if victim is not None:
            self.in_flight.end(victim, now_s)
            victim.preemptions += 1
            victim.recount()
            victim.stage, victim.queued_s = Stage.QUEUED, now_s
            if not len(self.queues):
                self._pace.began(now_s, self.in_flight.work_per_s)
            if not len(self.queues.of(victim.claim.priority)):
                self._pace_of[victim.claim.priority].began(now_s, self._left_by_higher(victim.claim.priority, now_s))
            self.queues.put_back(victim)
            step.preempted.append(victim)
            self._fill(step, now_s)
        return step

    def computed(self, entry: E, now_s: float) -> None:
        """Its prompt is computed. Again is fine."""
        if entry.stage is Stage.PREFILL:
            self.in_flight.computed(entry, now_s)

    def first_token(self, entry: E, now_s: float) -> None:
        """The workers have answered for the first time since it was sent; the prompt is computed then, too."""
        self.computed(entry, now_s)
        self.in_flight.first_token(entry, now_s)

    def end(self, entry: E, now_s: float) -> None:
        """The request is over, or its client has left it, wherever it was. Again is fine."""
        if entry.stage is Stage.QUEUED:
            self.queues.remove(entry)
        elif entry.stage in (Stage.PREFILL, Stage.DECODE):
            self.in_flight.end(entry, now_s)
        entry.stage = Stage.GONE

    def wait_s(self, entry: E, now_s: float) -> float:
        """Predicted wait in the queue, were the entry queued now."""
        assumed = self.in_flight.work_per_s
        # Without a queue, the time since the last one says nothing.
        pace = self._pace.of(now_s if len(self.queues) else self._pace.last_s, assumed)
        return (self.queues.work_before(entry) + entry.work) / pace

    def backlog_s(self, priority: Priority, now_s: float) -> float:
        """Predicted time in which all goes that waits now in this class and those above it."""
        if not len(self.queues):
            return 0.0
        work = sum(self.queues.of(one).work for one in Priority if one <= priority)
        return work / self._pace.of(now_s, self.in_flight.work_per_s)

    def _fill(self, step: Step[E], now_s: float) -> None:
        while len(self.queues):
            held = self.in_flight.bottleneck(now_s)
            if held is None:
                entry = self.queues.pop(now_s)
            elif held is Bottleneck.PREFILL and (overlooked := self._overlooked(now_s)) is not None:
                entry = overlooked
            else:
                return
            self._pace.left(entry.work, now_s)
            self._pace_of[entry.claim.priority].left(entry.work, now_s)
            self._begin(entry, now_s)
            step.granted.append(entry)

    def _overlooked(self, now_s: float) -> E | None:
        """The next one of a tenant that asks for little; see `InFlight.overlooked`."""
        priority = self.queues.first_waiting()
        # What batch requests hold is taken back in another way.
        if priority is None or self.in_flight.batch:
            return None
        tenant = self.in_flight.overlooked(self.queues.of(priority).weights(), now_s)
        return None if tenant is None else self.queues.pop_of(priority, tenant)

    def _victim(self, now_s: float) -> E | None:
        """The batch request to take back: the youngest one that holds what a realtime one waits for."""
        realtime = self.queues.of(Priority.REALTIME)
        if not len(realtime) or not self.in_flight.batch:
            return None
        oldest = realtime.oldest()
        slo_s = self.policy.ttft_slo_s
        threshold_s = max(slo_s * SLO_SHARE, slo_s - self.in_flight.first_token_s)
        to_come_s = oldest.work / self._pace.of(now_s, self.in_flight.work_per_s)
        if now_s - oldest.arrived_s + to_come_s < threshold_s:
            return None
        held = self.in_flight.bottleneck(now_s)
        for entry in reversed(self.in_flight.batch):
            helps = held is Bottleneck.DECODE or entry.stage is Stage.PREFILL
            if helps and entry.preemptions < self.policy.max_preemptions and entry.pausable:
                return entry
        return None


def _retry_after(wait_s: float) -> float:
    return min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
