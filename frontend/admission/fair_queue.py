"""The queue of one priority class: tenants share it by weight, each tenant's requests in their order.

Start-time fair queueing: P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queuing: A Scheduling Algorithm for
Integrated Services Packet Switching Networks", SIGCOMM 1996. A tenant's next request has a start tag, in virtual time:
where the tenant's last one ended (its start tag plus work over weight), but no earlier than now. The smallest start tag
goes next, and is the virtual time from then on. No clock and no rate are needed, and over any time in which two
tenants both wait, their work over weight differs by no more than one request of each.

Tags are kept by tenant and not by request, so that one that leaves the queue leaves no trace. When the queue is empty
everything is forgotten: nobody waited, so nobody was wronged.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from frontend.admission.claim import Entry

E = TypeVar("E", bound=Entry)

MAX_IDLE_TENANTS = 1024
"""Tenants remembered that have nothing queued; a forgotten one gains at most one request's work."""


@dataclass(slots=True)
class _Flow(Generic[E]):
    """One tenant: where its next request starts in virtual time, and its requests."""

    weight: float
    start: float
    entries: OrderedDict[E, None] = field(default_factory=OrderedDict)
    work: float = 0.0
    turn: int = 0  # the number of its valid place in the heap


class FairQueue(Generic[E]):
    """Constant or logarithmic time for all but `work_before` and `youngest_of_heaviest`, which look at each tenant."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[E]] = {}
        self._heap: list[tuple[float, int, _Flow[E]]] = []
        self._entries: OrderedDict[E, None] = OrderedDict()
        self._virtual = 0.0
        self._turns = 0
        self._work = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[E]:
        return iter(self._entries)

    def __contains__(self, entry: E) -> bool:
        return entry in self._entries

    @property
    def work(self) -> float:
        """Of all that is queued."""
        return self._work

    def add(self, entry: E, *, first: bool = False) -> None:
        """Queue an entry behind its tenant's others, or `first` among them."""
        assert entry not in self._entries, "queued twice"
        tenant = entry.claim.tenant
        flow = self._flows.get(tenant)
        if flow is None:
            flow = self._flows[tenant] = _Flow(entry.claim.weight, self._virtual)
        flow.weight = entry.claim.weight
        flow.entries[entry] = None
        if first:
            flow.entries.move_to_end(entry, last=False)
        flow.work += entry.work
        self._work += entry.work
        self._entries[entry] = None
        if len(flow.entries) == 1:
            flow.start = max(flow.start, self._virtual)
            self._push(flow)

    def remove(self, entry: E) -> None:
        """Take an entry out of the queue, as if it had never come."""
        flow = self._flows[entry.claim.tenant]
        self._take(flow, entry)
        if not flow.entries:
            flow.turn = -1
        self._forget()

    def peek(self) -> E:
        """The one that `pop` would give. The queue must not be empty."""
        while self._heap[0][1] != self._heap[0][2].turn:
            heapq.heappop(self._heap)
        return next(iter(self._heap[0][2].entries))

    def weights(self) -> dict[str, float]:
        """Of the tenants that wait."""
        return {tenant: flow.weight for tenant, flow in self._flows.items() if flow.entries}

    def pop(self, tenant: str | None = None) -> E:
        """The next one, or a tenant's next one out of its turn, which counts all the same. There must be one."""
        if tenant is None:
            self.peek()
            start, _, flow = heapq.heappop(self._heap)
            self._virtual = max(self._virtual, start)
        else:
            flow = self._flows[tenant]
            start = flow.start
        entry = next(iter(flow.entries))
        self._take(flow, entry)
        flow.start = start + entry.work / flow.weight
        flow.turn = -1
        if flow.entries:
            self._push(flow)
        self._forget()
        return entry

    def oldest(self) -> E:
        """The one that has been here for the longest time. The queue must not be empty."""
        return next(iter(self._entries))

    def work_before(self, entry: E) -> float:
        """Work that goes before this entry, were it queued now: its tenant's own, and what others get meanwhile."""
        own = self._flows.get(entry.claim.tenant)
        start, queued = (max(own.start, self._virtual), own.work) if own is not None else (self._virtual, 0.0)
        reached = start + queued / entry.claim.weight
        before = queued
        for flow in self._flows.values():
            if flow is not own and flow.entries and flow.start <= reached:
                # The one that begins before `reached` ends after it: the head's work stands for that one's.
                begun = (reached - flow.start) * flow.weight + next(iter(flow.entries)).work
                before += min(flow.work, begun)
        return before

    def backlog(self, tenant: str) -> float:
        """A tenant's queued work over its weight."""
        flow = self._flows.get(tenant)
        return flow.work / flow.weight if flow is not None else 0.0

    def youngest_of_heaviest(self) -> E | None:
        """What to drop: the last request of the tenant with the most work queued for its weight. None of those
        whose answer has begun."""
        flows = [flow for flow in self._flows.values() if flow.entries]
        for flow in sorted(flows, key=lambda flow: flow.work / flow.weight, reverse=True):
            for entry in reversed(flow.entries):
                if entry.tokens == 0:
                    return entry
        return None

    def _push(self, flow: _Flow[E]) -> None:
        self._turns += 1
        flow.turn = self._turns
        heapq.heappush(self._heap, (flow.start, flow.turn, flow))

    def _take(self, flow: _Flow[E], entry: E) -> None:
        del self._entries[entry]
        del flow.entries[entry]
        flow.work -= entry.work
        self._work -= entry.work

    def _forget(self) -> None:
        if not self._entries:
            self._flows.clear()
            self._heap.clear()
            self._virtual = self._work = 0.0
        elif len(self._heap) > 2 * len(self._entries) + MAX_IDLE_TENANTS:
            self._heap = [place for place in self._heap if place[1] == place[2].turn]
            heapq.heapify(self._heap)
        if len(self._flows) > len(self._entries) + MAX_IDLE_TENANTS:
            self._flows = {name: flow for name, flow in self._flows.items() if flow.entries}
