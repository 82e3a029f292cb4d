"""A planner whose decisions are written by a test: what the gRPC service and the command line show is real."""

from __future__ import annotations

from collections.abc import Mapping

from planner.history import History, Outcome
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.observation import Observation, WorkerSeen
from planner.scaling import Action, Considered, Counts, Decision
from slipstream.errors import ConfigError, InvalidRequestError
from slipstream.v1.planner_pb2 import TrafficReport
from slipstream.v1.registry_pb2 import DRAINING, READY, ROLE_DECODE, ROLE_PREFILL, STARTING

POLICY = PlannerObjectives((ModelObjectives("m", {"realtime": Objective(2.0, 0.05)}),), gpu_budget=8)
WORKERS = (
    WorkerSeen("p0", "m", ROLE_PREFILL, READY, 0.0, gpus=2),
    WorkerSeen("d0", "m", ROLE_DECODE, READY, 0.0, gpus=2),
    WorkerSeen("d1", "m", ROLE_DECODE, STARTING, 0.0, gpus=2),
    WorkerSeen("d2", "m", ROLE_DECODE, DRAINING, 0.0),
)


class SteppedPlanner:
    """A loop that makes the decisions it is given."""

    def __init__(self, most_kept: int = 100) -> None:
        self.objectives = POLICY
        self.history = History(most_kept)
        self.leading, self.holder, self.dry_run = True, "planner-1", False
        self.seen: Observation | None = None
        self.reports: list[TrafficReport] = []

    def take_report(self, report: TrafficReport) -> float:
        if not report.frontend_id:
            raise InvalidRequestError("frontend_id is missing", param="frontend_id")
        self.reports.append(report)
        return 1.0

    def on_demand(self) -> Mapping[str, float]:
        return {"cold": 3.0}

    def apply(self, objectives: PlannerObjectives, *, dry_run: bool = False) -> None:
        if any(one.profile == "none" for one in objectives.models):
            raise ConfigError("profile none: cannot be read", param="profile")
        if not dry_run:
            self.objectives = objectives

    def step(
        self,
        unix_s: float,
        *actions: Action,
        reason: str = "",
        numbers: Mapping[str, float] | None = None,
        considered: tuple[Considered, ...] = (),
    ) -> None:
        self.seen = Observation(unix_s, unix_s, 5.0, WORKERS, {})
        decision = Decision(unix_s, {"m": Counts(2, 1)}, actions, reason, numbers or {}, considered)
        made = self.history.add(decision, self.seen, leading=self.leading, dry_run=self.dry_run)
        self.history.done(made.number, [Outcome(f"new-{number}") for number, _ in enumerate(actions)])
