"""What a client may see go wrong, and under which fault. Everything else is answered, and answered right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.faults.chaos.plan import Group, Kind

GRACE_S = 6.0
"""How long after a fault is over (its process is back, and known) what it brought about may still be told."""

CUT = "cut"
GONE = frozenset({CUT, "shutting_down", "no_worker"})
"""Of a frontend that ends, or is new: connections break; as long as it does not know the workers yet, it says so."""
FULL = frozenset({"queue_overflow", "shed", "deadline_unreachable", "long_wait"})
"""429 with Retry-After: more is asked than the workers that are there can do."""
_NOTHING: frozenset[str] = frozenset()

PROMISES: dict[tuple[Kind, Group | None], frozenset[str]] = {
    (Kind.KILL, Group.FRONTEND): GONE,
    (Kind.KILL_MEMBER, Group.FRONTEND): GONE,
    (Kind.DRAIN, Group.FRONTEND): GONE,
    (Kind.CUT_CLIENTS, Group.FRONTEND): frozenset({CUT}),
    (Kind.STOP_SHORT, Group.FRONTEND): _NOTHING,
    (Kind.STOP_LONG, Group.FRONTEND): _NOTHING,
    (Kind.KILL, Group.PLANE): _NOTHING,
    (Kind.STOP_SHORT, Group.PLANE): _NOTHING,
    (Kind.STOP_LONG, Group.PLANE): _NOTHING,
    (Kind.GARBAGE, None): _NOTHING,
    (Kind.FLIP_BITS, None): _NOTHING,
    (Kind.OVERLOAD, None): FULL,
    (Kind.PRESSURE, None): FULL,
    (Kind.STAMPEDE, None): FULL,
}
LOST = frozenset({"migration_budget", "no_worker", "worker_draining"})
"""503, and come again: so many answers moved at once that no more may; no decode worker's connection is whole, or the
only one that is drains."""
_PREFILL_FAULT = FULL
_DECODE_FAULT = FULL | LOST
"""Of a fault of a worker: the others take over; what is asked may be more than they can do, or more than may move."""


@dataclass(slots=True)
class Disturbance:
    """A fault as it came about.

    Attributes:
        index: of the process in its group.
        ended_s: when it was over and everything known again; infinite until then.
    """

    title: str
    kind: Kind
    group: Group
    index: int
    began_s: float
    ended_s: float = float("inf")

    @property
    def promised(self) -> frozenset[str]:
        """Outcomes that it may cause."""
        for key in ((self.kind, self.group), (self.kind, None)):
            if key in PROMISES:
                return PROMISES[key]
        both = self.kind in (Kind.FLIP_ROLE, Kind.ROLLING)
        return _DECODE_FAULT if self.group is Group.DECODE or both else _PREFILL_FAULT

    def excuses(self, outcome: str, frontend: int, began_s: float, ended_s: float) -> bool:
        """Whether a try at that frontend, in that time, may have come to that."""
        if outcome not in self.promised or ended_s < self.began_s or began_s > self.ended_s + GRACE_S:
            return False
        return self.group is not Group.FRONTEND or outcome in FULL or self.index == frontend


def excused(
    disturbances: Iterable[Disturbance], outcome: str, frontend: int, began_s: float, ended_s: float
) -> Disturbance | None:
    """The first fault under which it may be."""
    return next((one for one in disturbances if one.excuses(outcome, frontend, began_s, ended_s)), None)
