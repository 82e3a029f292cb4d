"""The queues of all priority classes: how much may wait, who is dropped when that is too much, and who goes next.

Between classes the order is strict, but a class that has waited for `aging_s` gets at least a share of the work from
then on: nothing starves. All is bounded; in a full queue the tenant that fills it gives way, and lower classes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from frontend.admission.claim import Entry, Priority
from frontend.admission.fair_queue import FairQueue

E = TypeVar("E", bound=Entry)

AGED_SHARE = 0.1
"""Work that a class gets once it has aged, for each unit of work of the classes above it."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Requests that may wait.

    Attributes:
        by_class: in each class.
        total: in all of them together.
        aging_s: a class whose oldest request has waited this long gets its share.
    """

    by_class: Mapping[Priority, int]
    total: int
    aging_s: float


@dataclass(slots=True)
class Offer(Generic[E]):
    """Whether an entry was queued, and who was dropped for it."""

    queued: bool
    dropped: E | None = None


@dataclass(slots=True)
class ClassQueues(Generic[E]):
    """One fair queue for each class."""

    limits: QueueLimits
    expected_share: float = 0.25
    """Of each limit, what is kept beyond it for those who were told to come back."""
    _queues: dict[Priority, FairQueue[E]] = field(default_factory=lambda: {one: FairQueue() for one in Priority})
    _credit: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))
    _length: int = 0

    def __len__(self) -> int:
        return self._length

    def of(self, priority: Priority) -> FairQueue[E]:
        """The queue of one class; only to be looked at."""
        return self._queues[priority]

    def offer(self, entry: E, *, expected: bool = False) -> Offer[E]:
        """Queue an entry if there is room, or if one that has less right to it can be dropped.

        Args:
            expected: it was told to come now, and may go beyond the limits.
        """
        own = self._queues[entry.claim.priority]
        dropped: E | None = None
        times = 1.0 + self.expected_share if expected else 1.0
        if len(own) >= times * self.limits.by_class[entry.claim.priority]:
            dropped = _crowding_out(own, entry)
            if dropped is None:
                return Offer(queued=False)
        elif self._length >= times * self.limits.total:
            dropped = self._of_a_lower_class(entry) or _crowding_out(own, entry)
            if dropped is None:
                return Offer(queued=False)
        if dropped is not None:
            self.remove(dropped)
        self._add(entry)
        return Offer(queued=True, dropped=dropped)

    def put_back(self, entry: E) -> None:
        """Queue one that was with the workers already: before its tenant's others, and whatever the limits say."""
        self._add(entry, first=True)

    def remove(self, entry: E) -> None:
        """Take an entry out."""
        self._queues[entry.claim.priority].remove(entry)
        self._length -= 1

    def pop(self, now_s: float) -> E:
        """The next one. There must be one."""
        waiting = [one for one in Priority if len(self._queues[one])]
        aged = [one for one in waiting[1:] if self._has_aged(one, now_s)]
        chosen = next((one for one in aged if self._credit[one] >= self._queues[one].peek().work), waiting[0])
        entry = self._queues[chosen].pop()
        self._length -= 1
        for one in Priority:
            if one not in aged:
                self._credit[one] = 0.0
            elif one is chosen:
                self._credit[one] -= entry.work
            elif one > chosen:
                self._credit[one] += AGED_SHARE * entry.work
        return entry

    def first_waiting(self) -> Priority | None:
        """The highest class in which anything waits."""
        return next((one for one in Priority if len(self._queues[one])), None)

    def pop_of(self, priority: Priority, tenant: str) -> E:
        """A tenant's next one of a class, out of its turn. There must be one."""
        self._length -= 1
        return self._queues[priority].pop(tenant)

    def work_before(self, entry: E) -> float:
        """Work that goes before this entry, were it queued now. What its class may owe to aged ones is left out."""
        above = sum(self._queues[one].work for one in Priority if one < entry.claim.priority)
        return above + self._queues[entry.claim.priority].work_before(entry)

    def _add(self, entry: E, *, first: bool = False) -> None:
        self._queues[entry.claim.priority].add(entry, first=first)
        self._length += 1

    def _has_aged(self, priority: Priority, now_s: float) -> bool:
        return now_s - self._queues[priority].oldest().queued_s >= self.limits.aging_s

    def _of_a_lower_class(self, entry: E) -> E | None:
        for priority in reversed(Priority):
            if priority <= entry.claim.priority:
                return None
            candidate = self._queues[priority].youngest_of_heaviest()
            if candidate is not None:
                return candidate
        return None


def _crowding_out(queue: FairQueue[E], entry: E) -> E | None:
    """The youngest request of a tenant that has more of the queue than this entry's would have with it."""
    candidate = queue.youngest_of_heaviest()
    if candidate is None or candidate.claim.tenant == entry.claim.tenant:
        return None
    own = queue.backlog(entry.claim.tenant) + entry.work / entry.claim.weight
    return candidate if queue.backlog(candidate.claim.tenant) > own else None
