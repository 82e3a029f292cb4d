"""The invariants: each check counts, each violation is told at once, with all that is needed to find its cause."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.chaos.promises import Disturbance

_FAULTS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Violation:
    """Attributes:
    faults: what was done last before it.
    """

    invariant: str
    detail: str
    round: int
    at_s: float
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.invariant}: {self.detail} (round {self.round}, {self.at_s:.1f} s)"


@dataclass(slots=True)
class Checker:
    """Attributes:
    checked: how often each invariant was looked at.
    """

    say: Callable[[str], None]
    seed: int
    began_s: float = field(default_factory=time.monotonic)
    round: int = 0
    checked: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    disturbances: list[Disturbance] = field(default_factory=list)

    def check(self, invariant: str, holds: bool, detail: str | Callable[[], str] = "") -> bool:
        """Count it, and tell if it does not hold."""
        self.checked[invariant] += 1
        if not holds:
            self.violate(invariant, detail if isinstance(detail, str) else detail())
        return holds

    def violate(self, invariant: str, detail: str) -> None:
        now_s = time.monotonic()
        faults = tuple(
            f"{one.title} ({now_s - one.began_s:.1f} s ago"
            + (")" if one.ended_s > now_s else f", over for {now_s - one.ended_s:.1f} s)")
            for one in self.disturbances[-_FAULTS_SHOWN:]
        )
        found = Violation(invariant, detail, self.round, round(now_s - self.began_s, 2), faults)
        self.violations.append(found)
        self.say(f"VIOLATION of '{invariant}': {detail}")
        self.say(f"  seed {self.seed}, round {self.round}, {found.at_s:.1f} s after the begin; last faults:")
        for fault in faults:
            self.say(f"    {fault}")
