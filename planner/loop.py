"""The live planner: look, decide, act, every few seconds, for as long as the control plane runs.

Of several planners one acts: the one that holds the scaler's lease. The others look and decide all the same, and do
nothing, so that whoever gets the lease goes on warm. No failure of a policy, a scaler or a worker ends the loop: it is
logged, counted, and the next interval begins.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol

from planner.history import History, Made, Outcome
from planner.objectives import PlannerObjectives
from planner.observation import Observation
from planner.observer import Observer
from planner.replacing import Replacements, sick_worker
from planner.scaling import Action, Decision, Drain, ScalingPolicy, Start
from planner.traffic import REPORT_EVERY_S, TrafficBook
from slipstream import telemetry
from slipstream.errors import SlipstreamError
from slipstream.performance import Profile
from slipstream.scaler import Reporter, ScaledWorker, Scaler
from slipstream.v1.planner_pb2 import TrafficReport
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerSet
from slipstream.worker_settings import HealthSettings

log = telemetry.get_logger(__name__)

NOTE_EVERY_S = 0.5
"""Between two looks at how busy the workers are; their records come each second."""
LEASE_INTERVALS = 3.0
LEAST_LEASE_S = 3.0
RELEASE_TIMEOUT_S = 2.0


class LivePolicy(ScalingPolicy, Protocol):
    """A policy that may be told later how fast a model's workers are."""

    def know(self, model: str, prefill: Profile, decode: Profile) -> None:
        """The profiles of a model's prefill and decode workers."""
        ...

    def undone(self, action: Action) -> None:
        """An action of its last decision was not done."""
        ...

    def inherit(self, before: object) -> None:
        """Go on from what the policy before has learned, as far as it holds here too."""
        ...

    def start_s(self, model: str) -> float:
        """What a new worker of a model takes until it is ready."""
        ...


MakePolicy = Callable[[PlannerObjectives], LivePolicy]
"""Raises ConfigError where it cannot decide by these objectives."""


class PlannerLoop:
    """A `planner.planner_service.LivePlanner`; it plans while `follow` runs.

    Args:
        posted: the registry's set as it was posted last.
        dry_run: decide, tell, and do nothing. The lease is not taken either.
        health: limits of the replacing of sick workers.
        clock, unix_clock: seconds that never go backwards, and the time for people.

    Attributes:
        errors: failures by what was tried.
        acted: actions by kind and result.
        replaced: starts of workers in the place of sick ones, by result.
    """

    def __init__(
        self,
        objectives: PlannerObjectives,
        make_policy: MakePolicy,
        scaler: Scaler,
        posted: Callable[[], WorkerSet],
        *,
        dry_run: bool = False,
        holder: str = "",
        health: HealthSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.objectives = objectives
        self.history = History()
        self.holder = holder or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.dry_run = dry_run
        self.leading = False
        self.seen: Observation | None = None
        self.errors: Counter[str] = Counter()
        self.acted: Counter[tuple[str, str]] = Counter()
        self._make_policy = make_policy
        self._policy = make_policy(objectives)
        self._profiles: dict[str, tuple[Profile, Profile]] = {}
        self._scaler = scaler
        self._posted = posted
        self._clock = clock
        self._unix_clock = unix_clock
        self._book = TrafficBook(clock())
        self._observer = Observer(clock())
        self._scaled: Sequence[ScaledWorker] = ()
        self._failing: set[str] = set()
        self._health = health or HealthSettings()
        self._replacements = Replacements(self._health)
        self._reported: set[tuple[str, int]] = set()
        self.replaced: Counter[str] = Counter()

    @property
    def frontends(self) -> int:
        """That report."""
        return len(self._book)

    @property
    def lease_s(self) -> float:
        """After so long without a word from the planner that acts, another one may."""
        return max(LEAST_LEASE_S, LEASE_INTERVALS * self.objectives.interval_s)

    def take_report(self, report: TrafficReport) -> float:
        """See `LivePlanner.take_report`."""
        self._book.take(report, self._clock())
        return REPORT_EVERY_S

    def on_demand(self) -> Mapping[str, float]:
        """See `LivePlanner.on_demand`. A dry run starts nothing."""
        if self.dry_run:
            return {}
        models = (one.model for one in self.objectives.models if one.bounds.to_zero)
        # A decision comes first, and the worker is seen in the interval after it is ready.
        return {model: self._policy.start_s(model) + self.objectives.interval_s for model in models}

    def apply(self, objectives: PlannerObjectives, *, dry_run: bool = False) -> None:
        """See `LivePlanner.apply`. What the policy in force has learnt is kept as far as it still holds."""
        policy = self._make_policy(objectives)
        if dry_run:
            return
        policy.inherit(self._policy)
        for model, profiles in self._profiles.items():
            policy.know(model, *profiles)
        self.objectives, self._policy = objectives, policy

    def know(self, model: str, prefill: Profile, decode: Profile) -> None:
        """How fast a model's workers are, by their own word."""
        self._profiles[model] = (prefill, decode)
        self._policy.know(model, prefill, decode)

    async def follow(self) -> NoReturn:
        """Plan. Runs until cancelled; gives the lease back then."""
        try:
            while True:
                began_s = self._clock()
                await self.step()
                while (left_s := began_s + self.objectives.interval_s - self._clock()) > 0:
                    await asyncio.sleep(min(NOTE_EVERY_S, left_s))
                    self._observer.note(self._posted().workers)
        finally:
            await self._release()

    async def step(self) -> Made | None:
        """One interval: look, decide, and act if it is ours to act. None where the policy failed."""
        await self._look_at_scaler()
        now_s, posted = self._clock(), self._posted()
        self.leading = await self._lead(now_s)
        if self.leading and posted.settled and self._health.replace:
            await self._replace(posted.workers, now_s)
        self.seen = seen = self._observer.look(
            posted,
            self._scaled,
            self._book.collect(now_s),
            now_s=now_s,
            unix_s=self._unix_clock(),
            complete=self._book.whole(now_s),
            leaving=self._replacements.leaving(posted.workers),
        )
        try:
            decision = self._policy.decide(seen)
        except Exception:  # a policy is no reason for the control plane to end
            self.errors["decide"] += 1
            log.exception("policy_failed")
            return None
        made = self.history.add(decision, seen, leading=self.leading, dry_run=self.dry_run)
        self._tell(made)
        acts = self.leading and seen.complete
        outcomes = [await self._act(action) for action in decision.actions] if acts else []
        self.history.done(made.number, outcomes)
        for place, action in enumerate(decision.actions):
            if not acts or outcomes[place].error or _was_another(action, outcomes[place]):
                self._policy.undone(action)
        return made

    async def _look_at_scaler(self) -> None:
        try:
            self._scaled = await self._scaler.workers()
        except SlipstreamError as error:
            self._note_failure("workers", error)
        else:
            self._failing.discard("workers")

    async def _lead(self, now_s: float) -> bool:
        """Whether this planner is to act now."""
        # One that has just begun has not heard all frontends yet, and one that stood by and has may be there.
        if self.dry_run or not self._book.whole(now_s):
            return False
        try:
            held = await self._scaler.hold_lease(self.holder, self.lease_s)
        except SlipstreamError as error:
            self._note_failure("hold_lease", error)
            return False
        self._failing.discard("hold_lease")
        if held != self.leading:
            log.info("planner_leads" if held else "planner_stands_by", holder=self.holder)
        return held

    async def _replace(self, records: Sequence[WorkerRecord], now_s: float) -> None:
        """Have others started in the place of fenced workers, and these ended."""
        unix_s = self._unix_clock()
        for step in self._replacements.steps(records, self._scaled, now_s, unix_s):
            if step.sick is not None:
                await self._report(step.sick)
            action, outcome = step.action, await self._act(step.action)
            if isinstance(action, Start):
                self.replaced["failed" if outcome.error else "done"] += 1
            if outcome.error:
                self._replacements.failed(step, now_s)
                continue
            self._replacements.done(step, outcome.worker_id, now_s)
            if isinstance(action, Drain) and outcome.worker_id != action.worker_id:
                log.warning("another_than_the_sick_worker_ends", sick=action.worker_id, ends=outcome.worker_id)
            # As the scaler will list them from now on.
            if isinstance(action, Start):
                new = ScaledWorker(outcome.worker_id, action.model, action.role, unix_s)
                self._scaled = [*self._scaled, new]
            else:
                self._scaled = [
                    replace(one, ending=True) if one.worker_id == outcome.worker_id else one for one in self._scaled
                ]

    async def _report(self, sick: WorkerRecord) -> None:
        """Tell whoever owns its machine, once, if there is somebody to tell."""
        key = sick.worker_id, sick.epoch
        if key in self._reported or not isinstance(self._scaler, Reporter):
            return
        try:
            await self._scaler.report(sick_worker(sick))
        except SlipstreamError as error:
            self._note_failure("report", error)
        else:
            self._reported.add(key)
            self._failing.discard("report")

    async def _act(self, action: Action) -> Outcome:
        kind = type(action).__name__.lower()
        try:
            outcome = Outcome(await self._do(action))
        except SlipstreamError as error:
            self.acted[kind, "failed"] += 1
            log.warning("action_failed", action=text_of(action), reason=error.message)
            return Outcome(error=error.message)
        self.acted[kind, "done"] += 1
        log.info("action_done", action=text_of(action), worker_id=outcome.worker_id)
        return outcome

    async def _do(self, action: Action) -> str:
        if isinstance(action, Start):
            return await self._scaler.start(action.model, action.role)
        if isinstance(action, Drain):
            return await self._scaler.drain(action.worker_id)
        await self._scaler.flip(action.worker_id, action.role)
        return action.worker_id

    async def _release(self) -> None:
        if not self.leading:
            return
        self.leading = False
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._scaler.release_lease(self.holder)
        except (SlipstreamError, TimeoutError) as error:  # it ends by itself
            log.info("lease_not_released", reason=str(error))

    def _note_failure(self, what: str, error: SlipstreamError) -> None:
        self.errors[what] += 1
        if what not in self._failing:
            log.warning("scaler_failed", call=what, reason=error.message)
        self._failing.add(what)

    def _tell(self, made: Made) -> None:
        if not made.decision.actions or not (self.leading or self.dry_run):
            return
        log.info(
            "dry_run" if self.dry_run else "decided",
            number=made.number,
            targets=_texts(made.decision),
            actions=[text_of(action) for action in made.decision.actions],
            reason=made.decision.reason,
        )


def _was_another(action: Action, outcome: Outcome) -> bool:
    """Whether a worker ends that was not meant: it will be seen to, and the one that was meant stays."""
    return isinstance(action, Drain) and outcome.worker_id != action.worker_id


def text_of(action: Action) -> str:
    """`start decode m`, `drain worker-3`, `flip worker-1 to prefill`."""
    if isinstance(action, Start):
        return f"start {role_name(action.role)} {action.model}"
    if isinstance(action, Drain):
        return f"drain {action.worker_id}"
    return f"flip {action.worker_id} to {role_name(action.role)}"


def role_name(role: Role.ValueType) -> str:
    """As people write it."""
    return Role.Name(role).removeprefix("ROLE_").lower()


def _texts(decision: Decision) -> Mapping[str, str]:
    return {model: str(counts) for model, counts in decision.targets.items()}
