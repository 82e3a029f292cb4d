"""What a scaling policy is: observations in, decisions out. Worker counts, the actions towards them, and why.

Ours and the baselines have this shape, so that the live loop, the simulator and the benchmark run any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from planner.observation import Observation
from slipstream.v1.registry_pb2 import Role


@dataclass(frozen=True, slots=True, order=True)
class Counts:
    """Workers of one model. No prefill workers at all: an aggregated pool, in which decode computes prompts too."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


@dataclass(frozen=True, slots=True)
class Start:
    """A new worker."""

    model: str
    role: Role.ValueType


@dataclass(frozen=True, slots=True)
class Drain:
    """A worker gets nothing new, finishes what it has, and ends."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Flip:
    """A worker takes the other role, with its model loaded and its cache warm; what it has it finishes."""

    worker_id: str
    role: Role.ValueType


Action = Start | Drain | Flip


@dataclass(frozen=True, slots=True)
class Considered:
    """One choice of counts that was weighed for a model, and what was expected of it; the one taken, too.

    Attributes:
        gpus: that it takes.
        ttft_s, itl_s: predicted at the objective's percentile, of the class that fares worst.
        verdict: `chosen`, or in a few words why it was not.
    """

    model: str
    counts: Counts
    gpus: int
    ttft_s: float
    itl_s: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What shall be, and why.

    Attributes:
        targets: workers wanted, by model; a model that is absent is left as it is.
        actions: the steps towards them that are taken now, in order; none where limits forbid them for now.
        reason: one line for people.
        numbers: what it was computed from, by name with unit; `slipstream planner explain` prints them.
        considered: the choices nearest to the one taken, and that one, by model; a few of each.
    """

    at_s: float
    targets: Mapping[str, Counts]
    actions: tuple[Action, ...] = ()
    reason: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    considered: tuple[Considered, ...] = ()


class ScalingPolicy(Protocol):
    """Decides from what it has been shown so far. Pure: no clock, no I/O, and by one seed always the same."""

    def decide(self, seen: Observation) -> Decision:
        """Called once an interval, in order of time."""
        ...
