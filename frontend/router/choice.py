"""The router's door: checks that there is a worker at all, then asks the policy. Pure: no clock, no I/O.

Policies are functions of an `Ask`, the `Fleet`, the time and their own small state; the simulator asks the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

from frontend.router.ask import Ask
from frontend.router.by_time import by_time
from frontend.router.candidate import Candidate
from frontend.router.fleet import Fleet
from frontend.router.policies import by_load, by_power_of_two, by_session, by_turns
from frontend.router.route import Route
from slipstream.errors import ModelNotFoundError, NoWorkerError
from slipstream.v1.registry_pb2 import Role, WorkerState

RETRY_AFTER_S = 2.0
"""What a client is told to wait when no worker is there: about the time in which one is found again."""

PolicyName = Literal["kv", "session", "load", "round_robin", "power_of_two"]


class Policy(Protocol):
    """How workers are chosen among those of the ask's model, of which at least one can take it."""

    def __call__(self, ask: Ask, fleet: Fleet, now_s: float) -> Route: ...


@dataclass(slots=True)
class Router:
    """One frontend's router.

    Args:
        always_hand_off: never let decode compute a prompt alone where a prefill worker could; `kv` and `session` only.
        random: of `power_of_two`.
    """

    policy: PolicyName = "kv"
    always_hand_off: bool = False
    random: Random = field(default_factory=lambda: Random(0))
    _turn: int = 0

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route:
        """Choose one decode worker, and one prefill worker unless decode does it alone.

        Raises:
            ModelNotFoundError: no worker in any state serves the model.
            NoWorkerError: no decode worker of the model can take a request now.
        """
        check(ask, fleet)
        self._turn += 1
        match self.policy:
            case "kv":
                return by_time(ask, fleet, now_s, always_hand_off=self.always_hand_off)
            case "session":
                if ask.session:
                    return by_session(ask, fleet)
                return by_time(ask, fleet, now_s, always_hand_off=self.always_hand_off)
            case "load":
                return by_load(ask, fleet)
            case "round_robin":
                return by_turns(ask, fleet, self._turn)
            case "power_of_two":
                return by_power_of_two(ask, fleet, self.random)


def check(ask: Ask, fleet: Fleet) -> None:
    """Raises what `Router.choose` raises; every policy may take for granted what holds afterwards."""
    decodes = fleet.pool(ask.model, Role.ROLE_DECODE)
    if decodes and decodes.can_take(ask):
        return
    prefills = fleet.pool(ask.model, Role.ROLE_PREFILL)
    if not decodes and not prefills:
        raise ModelNotFoundError(f"the model {ask.model!r} does not exist", param="model")
    raise NoWorkerError(_why_none(ask, decodes.members if decodes else []), retry_after_s=RETRY_AFTER_S)


def _why_none(ask: Ask, decodes: Iterable[Candidate]) -> str:
    decodes = list(decodes)
    if not decodes:
        return f"no decode worker of model {ask.model!r} is registered"
    states = sorted({_condition(one, ask) for one in decodes})
    return f"no decode worker of model {ask.model!r} can take a request: {len(decodes)} registered, {', '.join(states)}"


def _condition(one: Candidate, ask: Ask) -> str:
    if one.worker_id in ask.excluded:
        return "failed this request"
    if one.worker_id in ask.suspects:
        return "not answering"
    return WorkerState.Name(one.record.state).lower()
