"""The control loop in virtual time: a scaling policy looks every few seconds, and what it decides happens here.

`SimulatedScaler` is what a live scaler is to the planner, with the time that starts and flips take. It is no
`slipstream.scaler.Scaler`: nothing of it waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.scaling import Decision, Drain, Flip, ScalingPolicy, Start
from simulator.members import Members
from simulator.observing import Observer
from simulator.serving import SimulatedCluster
from slipstream.v1.registry_pb2 import Role

MAX_DECISIONS_KEPT = 10_000
"""Of those that did anything; a run that changes its workers more often than that is counted, not told."""


@dataclass(frozen=True, slots=True)
class Done:
    """One action of a decision; `refused` says why it was not taken, empty when it was."""

    kind: str
    model: str
    role: str
    worker_id: str
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision that asked for something."""

    at_s: float
    reason: str
    targets: dict[str, str]
    actions: tuple[Done, ...]


class SimulatedScaler:
    """Takes actions within a budget of GPUs.

    Args:
        gpu_budget: GPUs of all workers together, starting and draining ones too; 0: as many as asked for.
        start_s: from a worker's start until it is ready; flip_s: from a flip until it takes the new role's requests.
    """

    def __init__(self, members: Members, *, gpu_budget: int, start_s: float, flip_s: float) -> None:
        self._members = members
        self._gpu_budget = gpu_budget
        self._start_s = start_s
        self._flip_s = flip_s

    def take(self, action: Start | Drain | Flip) -> Done:
        """One action, now."""
        if isinstance(action, Start):
            return self._start(action)
        one = self._members.present.get(action.worker_id)
        model = one.pool.model if one is not None else ""
        refused = "" if one is not None else "no such worker"
        if isinstance(action, Drain):
            self._members.drain(action.worker_id)
            role = one.role if one is not None else Role.ROLE_UNSPECIFIED
            return Done("drain", model, role_name(role), action.worker_id, refused)
        if not self._members.flip(action.worker_id, action.role, self._flip_s) and not refused:
            refused = "not ready, or of that role already"
        return Done("flip", model, role_name(action.role), action.worker_id, refused)

    def _start(self, action: Start) -> Done:
        role = role_name(action.role)
        gpus = self._members.gpus_of(action.model, action.role)
        if self._gpu_budget and self._members.gpus + gpus > self._gpu_budget:
            refused = f"{self._members.gpus} of {self._gpu_budget} GPUs are occupied, {gpus} more are needed"
            return Done("start", action.model, role, "", refused)
        one = self._members.start(action.model, action.role, self._start_s)
        return Done("start", action.model, role, one.worker_id)


@dataclass(slots=True)
class ControlLoop:
    """Asks the policy every `interval_s` for as long as the cluster has anything to do."""

    cluster: SimulatedCluster
    policy: ScalingPolicy
    scaler: SimulatedScaler
    observer: Observer
    interval_s: float
    decided: list[Decided] = field(default_factory=list)
    actions: int = 0
    refused: int = 0

    def begin(self) -> None:
        """The first look is one interval from now."""
        self.cluster.loop.after(self.interval_s, self._look)

    def _look(self) -> None:
        if not self.cluster.busy:
            return
        decision = self.policy.decide(self.observer.look())
        if decision.actions:
            self._act(decision)
        self.cluster.loop.after(self.interval_s, self._look)

    def _act(self, decision: Decision) -> None:
        done = tuple(self.scaler.take(action) for action in decision.actions)
        self.actions += len(done)
        self.refused += sum(1 for one in done if one.refused)
        if len(self.decided) < MAX_DECISIONS_KEPT:
            targets = {model: str(counts) for model, counts in decision.targets.items()}
            self.decided.append(Decided(decision.at_s, decision.reason, targets, done))


def role_name(role: Role.ValueType) -> str:
    """As people write it."""
    return Role.Name(role).removeprefix("ROLE_").lower()
