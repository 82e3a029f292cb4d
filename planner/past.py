"""One model as a policy remembers it: what was seen of it, what was learned, and when something was done to it last."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.bars import Bars
from planner.caution import Caution
from planner.corrections import Learner
from planner.demand import DemandSeen
from planner.objectives import ModelObjectives
from planner.scaling import Counts
from planner.steps import Coming


@dataclass(slots=True)
class Past:
    """One model: what was seen of it, and when something was done to it last."""

    objectives: ModelObjectives
    learner: Learner | None = None
    classes: dict[str, DemandSeen] = field(default_factory=dict)
    coming: Coming = field(default_factory=Coming)
    needs: deque[tuple[float, Counts]] = field(default_factory=deque)
    bars: Bars = field(default_factory=Bars)
    caution: Caution = field(default_factory=Caution)
    up_s: float = -math.inf
    down_s: float = -math.inf
    flip_s: float = -math.inf
    gave_s: float = -math.inf

    def inherit(self, before: Past, horizon_s: float) -> None:
        """What was learned of the traffic and the workers, and what is under way; of what hangs on the limits only
        what was learned under the same ones."""
        self.classes, self.coming = before.classes, before.coming
        self.up_s, self.down_s, self.flip_s = before.up_s, before.down_s, before.flip_s
        self.gave_s = before.gave_s
        for known in self.classes.values():
            known.requests.look_ahead(horizon_s)
        if before.learner is not None and (
            self.learner is None or self.learner.pair.profiles == before.learner.pair.profiles
        ):
            self.learner = before.learner
        if self.objectives.objectives == before.objectives.objectives:
            self.needs, self.bars, self.caution = before.needs, before.bars, before.caution


def at_least(one: Counts, other: Counts) -> Counts:
    """Of each role the larger number."""
    return Counts(max(one.prefill, other.prefill), max(one.decode, other.decode))


def fewest(one: Counts, other: Counts) -> Counts:
    """Of each role the smaller number."""
    return Counts(min(one.prefill, other.prefill), min(one.decode, other.decode))


def most(needs: Iterable[Counts]) -> Counts:
    """Of each role what any of them has at the most."""
    found = Counts(0, 0)
    for counts in needs:
        found = at_least(found, counts)
    return found
