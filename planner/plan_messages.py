"""Plans and decisions as they travel over gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from planner.history import Made, Outcome, ready_counts
from planner.objectives import PlannerObjectives
from planner.observation import Observation
from planner.policy_file import dump_policy
from planner.scaling import Action, Counts, Flip, Start
from slipstream.v1.planner_pb2 import (
    ConsideredCounts,
    ModelCounts,
    ModelPlan,
    Plan,
    PlannerAction,
    PlannerDecision,
    WorkerCounts,
)
from slipstream.v1.registry_pb2 import WorkerState


def decision_message(made: Made, *, with_considered: bool = True) -> PlannerDecision:
    """One decision; without what was considered it is a tenth of the size."""
    decision = made.decision
    return PlannerDecision(
        number=made.number,
        unix_s=made.unix_s,
        reason=decision.reason,
        actual=_by_model(made.actual),
        targets=_by_model(decision.targets),
        actions=[
            _action(action, outcome) for action, outcome in zip_longest(decision.actions, made.outcomes) if action
        ],
        numbers=decision.numbers,
        considered=[
            ConsideredCounts(
                model=one.model,
                counts=_counts(one.counts),
                gpus=one.gpus,
                ttft_s=one.ttft_s,
                itl_s=one.itl_s,
                verdict=one.verdict,
            )
            for one in (decision.considered if with_considered else ())
        ],
        dry_run=made.dry_run,
        leading=made.leading,
    )


def plan_message(
    objectives: PlannerObjectives,
    seen: Observation | None,
    latest: Made | None,
    *,
    leading: bool,
    holder: str,
    dry_run: bool,
) -> Plan:
    """What there is and what is wanted."""
    workers = seen.workers if seen is not None else ()
    actual = ready_counts(seen) if seen is not None else {}
    targets = latest.decision.targets if latest is not None else {}
    names = list(dict.fromkeys([*(one.model for one in objectives.models), *sorted(actual), *sorted(targets)]))
    states = [(worker.model, worker.state) for worker in workers]
    return Plan(
        leading=leading,
        holder=holder,
        dry_run=dry_run,
        policy_yaml=dump_policy(objectives),
        models=[
            ModelPlan(
                model=name,
                actual=_counts(actual.get(name, Counts(0, 0))),
                target=_counts(targets[name]) if name in targets else None,
                starting=states.count((name, WorkerState.STARTING)),
                draining=states.count((name, WorkerState.DRAINING)),
            )
            for name in names
        ],
        latest=decision_message(latest) if latest is not None else None,
        gpu_budget=objectives.gpu_budget,
        gpus_used=sum(worker.gpus for worker in workers),
        interval_s=objectives.interval_s,
    )


def _action(action: Action, outcome: Outcome | None) -> PlannerAction:
    if isinstance(action, Start):
        message = PlannerAction(kind=PlannerAction.START, model=action.model, role=action.role)
    elif isinstance(action, Flip):
        message = PlannerAction(kind=PlannerAction.FLIP, worker_id=action.worker_id, role=action.role)
    else:
        message = PlannerAction(kind=PlannerAction.DRAIN, worker_id=action.worker_id)
    if outcome is not None:
        message.worker_id = outcome.worker_id or message.worker_id
        message.error = outcome.error
    return message


def _by_model(counts: Mapping[str, Counts]) -> list[ModelCounts]:
    return [ModelCounts(model=model, counts=_counts(one)) for model, one in counts.items()]


def _counts(counts: Counts) -> WorkerCounts:
    return WorkerCounts(prefill=counts.prefill, decode=counts.decode)
