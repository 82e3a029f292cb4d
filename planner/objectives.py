"""What a planner is to reach, and within which bounds: the scaling policy's settings as plain data.

`planner.policy_file` reads them from YAML; tests and the simulator make them directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.scaling import Counts


@dataclass(frozen=True, slots=True)
class Objective:
    """The SLO of one priority class.

    Attributes:
        ttft_s, itl_s: limits.
        percentile: of requests that shall keep each of both, in percent.
    """

    ttft_s: float
    itl_s: float
    percentile: float = 99.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least and most workers of each role. At least one each unless `to_zero`: then none while nothing comes.

    Attributes:
        idle_s: without a request for so long, a pool that may go to zero does.
    """

    min_prefill: int = 1
    min_decode: int = 1
    max_prefill: int = 1024
    max_decode: int = 1024
    to_zero: bool = False
    allow_aggregated: bool = False
    idle_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Window:
    """A floor for certain hours, told in advance: a campaign, an opening hour.

    Attributes:
        weekdays: 0 is Monday; none: every day.
        start_s, end_s: seconds after midnight UTC; an end before the start lies on the next day.
    """

    start_s: int
    end_s: int
    floor: Counts
    weekdays: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelObjectives:
    """One model's pool.

    Attributes:
        profile: name of a packaged profile or path of a file; workers that bring their own need none.
        objectives: by priority class; `batch` needs none: it takes what is left.
        weight: which model goes first when the budget does not suffice for all: the larger one's objectives.
    """

    model: str
    objectives: Mapping[str, Objective]
    profile: str = ""
    bounds: Bounds = Bounds()
    schedule: tuple[Window, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PlannerObjectives:
    """All of a policy.

    Attributes:
        gpu_budget: GPUs that all models' workers may occupy together.
        interval_s: between two decisions.
        start_s: what a new worker takes until it is ready, before one has been seen to start.
        up_cooldown_s, down_cooldown_s, flip_cooldown_s: least time between two actions of the kind on one
            model; also after an opposite one.
        max_actions: in one decision, over all models.
        horizon_s: how far ahead is planned; at least what a start takes.
    """

    models: tuple[ModelObjectives, ...]
    gpu_budget: int
    interval_s: float = 5.0
    start_s: float = 60.0
    up_cooldown_s: float = 10.0
    down_cooldown_s: float = 120.0
    flip_cooldown_s: float = 20.0
    max_actions: int = 4
    horizon_s: float = 120.0

    def of(self, model: str) -> ModelObjectives | None:
        """The pool of that model."""
        return next((one for one in self.models if one.model == model), None)
