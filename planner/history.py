"""What the planner decided lately: kept in memory, a bounded number of decisions, for people who ask why."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from planner.observation import Observation
from planner.scaling import Counts, Decision
from slipstream.v1.registry_pb2 import Role, WorkerState

MOST_KEPT = 2048
"""Most of them; at one decision in five seconds almost three hours."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one action.

    Attributes:
        worker_id: of what was started; empty where that failed.
        error: why it could not be done; empty where it was.
    """

    worker_id: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """One decision as it was made.

    Attributes:
        number: counts from 1.
        actual: ready workers by model at that moment.
        leading: this planner held the lease, and so acted, unless `dry_run`.
        outcomes: of the decision's actions, in their order, as far as they were tried.
    """

    number: int
    unix_s: float
    decision: Decision
    actual: Mapping[str, Counts]
    leading: bool
    dry_run: bool
    outcomes: Sequence[Outcome] = field(default_factory=tuple)


def ready_counts(seen: Observation) -> dict[str, Counts]:
    """Ready workers of each model."""
    ready: Counter[tuple[str, Role.ValueType]] = Counter(
        (worker.model, worker.role) for worker in seen.workers if worker.state == WorkerState.READY
    )
    models = sorted({worker.model for worker in seen.workers})
    return {model: Counts(ready[model, Role.ROLE_PREFILL], ready[model, Role.ROLE_DECODE]) for model in models}


class History:
    """The decisions made lately. What is asked of it costs no more than what it answers."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._made: deque[Made] = deque(maxlen=most)
        self._count = 0

    def __len__(self) -> int:
        return len(self._made)

    @property
    def latest(self) -> Made | None:
        """None before the first."""
        return self._made[-1] if self._made else None

    def add(self, decision: Decision, seen: Observation, *, leading: bool, dry_run: bool) -> Made:
        """Keep a decision; its outcomes follow with `done`."""
        self._count += 1
        made = Made(self._count, seen.unix_s, decision, ready_counts(seen), leading, dry_run)
        self._made.append(made)
        return made

    def done(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """What became of a decision's actions; of one that is forgotten already: nothing."""
        place = self._place(number)
        if place is not None:
            self._made[place] = replace(self._made[place], outcomes=tuple(outcomes))

    def numbered(self, number: int) -> Made | None:
        """None of one that never was or is forgotten."""
        place = self._place(number)
        return None if place is None else self._made[place]

    def at(self, unix_s: float) -> Made | None:
        """The last one up to then."""
        return next((made for made in reversed(self._made) if made.unix_s <= unix_s), None)

    def since(self, unix_s: float, limit: int, *, acted_only: bool = False) -> list[Made]:
        """The latest first."""
        wanted = (
            made for made in reversed(self._made) if made.unix_s >= unix_s and (made.decision.actions or not acted_only)
        )
        return list(islice(wanted, limit))

    def _place(self, number: int) -> int | None:
        place = number - 1 - (self._count - len(self._made))
        return place if 0 <= place < len(self._made) else None
