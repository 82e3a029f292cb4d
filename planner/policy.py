"""Our scaling policy: observe, forecast, choose, act. `docs/planner-model.md` tells it with formulas.

Upwards it goes at once, by the forecast with as much of its bound as requests that were late have taught (`caution`).
Downwards only when the workers that stay would have met every objective at every moment of a window: what is needed now
and then is needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from planner.account import Account, Look, numbers_of, reason_of
from planner.capacity import Corrections, Pair, PrefillQueue
from planner.choose import PoolAsk, choose, unbarred
from planner.considered import considered_of
from planner.corrections import Learner
from planner.demand import Demand, DemandSeen, together
from planner.objectives import Objective, PlannerObjectives
from planner.observation import Observation, Traffic, WorkerSeen
from planner.past import Past, at_least, fewest, most
from planner.pool_model import Asked, PoolModel
from planner.scaling import Action, Counts, Decision, Flip, Start
from planner.schedule import active
from planner.steps import Limits, counts_of, room, steps
from slipstream.performance import Profile
from slipstream.v1.registry_pb2 import Role, WorkerState

FIRST_LOOK_S = 60.0
"""Before so much was seen, nothing is taken away, and nothing is done at all while few requests are late."""
FIRST_DOWN = 0.5
"""Of `down_cooldown_s`, until the first worker was started: a pool that somebody else chose to begin with, and that
never was too small, cannot go back and forth."""
CLEAR_LIMITS, LEAST_CLEAR_S, MOST_CLEAR_S = 3.0, 15.0, 60.0
"""A backlog shall be worked off within so many times the TTFT limit: what comes until then is late."""
DRAIN_SHARE = 0.5
"""Of a pool, what one decision may take away: what a whole window did not need."""
WAITS_SHARE = 0.25
"""Of the TTFT limit: while more waits at each prefill worker, none is drained."""
BATCH = "batch"
BATCH_OBJECTIVE = Objective(ttft_s=3600.0, itl_s=10.0, percentile=50.0)
BATCH_CLEAR_S = 600.0


class SloPolicy:
    """A `planner.scaling.ScalingPolicy`.

    Args:
        profiles: by model, of its prefill and its decode workers; one that is not known yet is told by `know`.
        tells_considered: decisions say what else was weighed, for people; it costs as much as deciding does.
    """

    def __init__(
        self,
        objectives: PlannerObjectives,
        profiles: Mapping[str, Profile | tuple[Profile, Profile]] | None = None,
        *,
        tells_considered: bool = False,
    ) -> None:
        self._objectives = objectives
        self._tells_considered = tells_considered
        self._past = {one.model: Past(one) for one in objectives.models}
        for model, profile in (profiles or {}).items():
            self.know(model, *(profile if isinstance(profile, tuple) else (profile, profile)))

    def know(self, model: str, prefill: Profile, decode: Profile) -> None:
        """The profiles of a model's workers; what was learned of others is forgotten."""
        past = self._past.get(model)
        if past is None:
            return
        before = past.learner
        if before is None or before.pair.profiles != (prefill, decode):
            past.learner = Learner(Pair.of(prefill, decode))

    def inherit(self, before: object) -> None:
        """Go on from what another one has learned, as far as it holds here too. That one is done."""
        if isinstance(before, SloPolicy):
            for model, past in self._past.items():
                if model in before._past:
                    past.inherit(before._past[model], self._horizon_s(before._past[model]))

    def decide(self, seen: Observation) -> Decision:
        """Called once an interval, in order of time."""
        if not seen.complete:
            # What was not heard yet looks like workers that are gone and requests that stopped.
            return Decision(seen.at_s, {}, (), "not every frontend and worker has been heard yet: nothing is done")
        looks = {model: self._look(past, seen) for model, past in self._past.items()}
        known = {model: past.learner for model, past in self._past.items() if past.learner is not None}
        asks = [
            self._ask(self._past[model], looks[model], learner, looks[model].patience)
            for model, learner in known.items()
        ]
        careful = [
            self._ask(self._past[model], looks[model], learner, self._past[model].caution.margin)
            for model, learner in known.items()
        ]
        wanted = choose(asks, self._objectives.gpu_budget)
        for ask in asks:
            past = self._past[ask.model]
            tried = past.bars.least(looks[ask.model].load, seen.at_s, past.caution.band)
            wanted[ask.model] = unbarred(ask, wanted[ask.model], tried, self._objectives.gpu_budget)
        kept = choose(careful, self._objectives.gpu_budget)
        targets = {}
        for model in self._past:
            look, past = looks[model], self._past[model]
            floor_only = at_least(look.have, look.floor)
            targets[model] = self._settle(past, look, wanted.get(model, floor_only), kept.get(model, floor_only), seen)
        urgent = self._fit_budget(targets, wanted, asks)
        actions, notes = self._act(looks, targets, urgent, seen)
        predictions = {ask.model: ask.pool.predicted(looks[ask.model].have) for ask in asks}
        accounts = [
            Account(look, targets[model], wanted.get(model), kept.get(model), predictions.get(model), notes[model])
            for model, look in looks.items()
        ]
        numbers = {"gpu_budget": float(self._objectives.gpu_budget)} | numbers_of(accounts, seen)
        considered = considered_of(asks, targets, self._objectives.gpu_budget) if self._tells_considered else ()
        return Decision(seen.at_s, targets, tuple(actions), reason_of(accounts), numbers, considered)

    def start_s(self, model: str) -> float:
        """What a new worker takes until it is ready: as seen, or as set before one was."""
        past = self._past.get(model)
        return (past.coming.start_s if past is not None else 0.0) or self._objectives.start_s

    def undone(self, action: Action) -> None:
        """An action of the last decision will not be done. Its cooldown holds: it is not tried again at once."""
        for past in self._past.values():
            if not isinstance(action, Start) or action.model == past.objectives.model:
                past.coming.forget(action)

    # -- what is ------------------------------------------------------------------------------------------

    def _look(self, past: Past, seen: Observation) -> Look:
        model = past.objectives.model
        own = [one for one in seen.workers if one.model == model]
        workers = past.coming.seen(own, seen.at_s)
        horizon_s = self._horizon_s(past)
        traffic = {name: part for (one, name), part in seen.traffic.items() if one == model}
        for name in past.objectives.objectives:
            past.classes.setdefault(name, DemandSeen(horizon_s))
        for name in traffic:
            past.classes.setdefault(name, DemandSeen(horizon_s))
        for name, known in past.classes.items():
            known.add(traffic.get(name), seen.interval_s, seen.unix_s)
        served = [name for name in past.classes if name != BATCH]
        self._learn(past, own, traffic, seen)
        past.caution.add(traffic, past.objectives.objectives)
        forecasts = {name: past.classes[name].requests.forecast(horizon_s) for name in served}
        expected = {name: past.classes[name].demand(forecast.mean) for name, forecast in forecasts.items()}
        demands = {name: past.caution.prepared(one, forecasts[name]) for name, one in expected.items()}
        return Look(
            model,
            workers,
            counts_of(workers, past.coming.starts),
            self._floor(past, seen),
            self._backlog_s(past, own, traffic),
            demands,
            self._batch(past, traffic),
            _load(expected.values()),
            {name: past.classes[name].requests.calm for name in served},
            past.learner.corrections if past.learner is not None else Corrections(),
            past.objectives.objectives,
            past.caution.level,
            past.caution.patience(max((one.excess for one in forecasts.values()), default=0.0)),
        )

    def _horizon_s(self, past: Past) -> float:
        """At least what a start takes, as seen, or as set before one was."""
        return max(self._objectives.horizon_s, past.coming.start_s or self._objectives.start_s)

    def _learn(self, past: Past, workers: list[WorkerSeen], traffic: Mapping[str, Traffic], seen: Observation) -> None:
        if past.learner is None:
            return
        whole = Traffic()
        for part in traffic.values():
            whole.merge(part)
        now = together([one.demand(one.requests.forecast(0.0).mean) for one in past.classes.values()])
        past.learner.learn(workers, whole, now, seen.at_s, seen.interval_s)

    def _backlog_s(self, past: Past, workers: list[WorkerSeen], traffic: Mapping[str, Traffic]) -> float:
        """Prompts that wait, as seconds of one worker's time: in the frontends, and accepted but not computed."""
        if past.learner is None:
            return 0.0
        now = together([one.demand(max(1e-6, one.requests.calm)) for one in past.classes.values()])
        queue = PrefillQueue(now, past.learner.pair.prefill, correction=past.learner.corrections.prefill)
        queued = sum(part.queued_tokens for name, part in traffic.items() if name != BATCH)
        waiting = queued * (1.0 - now.hit_rate) + sum(one.waiting_tokens for one in workers)
        return waiting / max(1.0, now.input_tokens * (1.0 - now.hit_rate)) * queue.mean_s

    def _batch(self, past: Past, traffic: Mapping[str, Traffic]) -> Demand | None:
        known = past.classes.get(BATCH)
        if known is None:
            return None
        queued = traffic[BATCH].queued if BATCH in traffic else 0
        rate = known.requests.forecast(0.0).mean + queued / BATCH_CLEAR_S
        return known.demand(rate) if rate * BATCH_CLEAR_S >= 0.5 else None

    def _floor(self, past: Past, seen: Observation) -> Counts:
        bounds = past.objectives.bounds
        idle_s = min((one.idle_s for one in past.classes.values()), default=math.inf)
        floor = Counts(bounds.min_prefill, bounds.min_decode)
        if bounds.to_zero and idle_s >= bounds.idle_s:
            floor = Counts(0, 0)
        elif bounds.allow_aggregated:
            floor = Counts(0, max(1, floor.decode))
        for window in past.objectives.schedule:
            if active(window, seen.unix_s, self._horizon_s(past)):
                floor = at_least(floor, window.floor)
        return Counts(min(floor.prefill, bounds.max_prefill), min(floor.decode, bounds.max_decode))

    # -- what shall be ------------------------------------------------------------------------------------

    def _ask(self, past: Past, look: Look, learner: Learner, margin: float) -> PoolAsk:
        objectives = past.objectives.objectives
        ready = sum(one.role == Role.ROLE_PREFILL and one.state == WorkerState.READY for one in look.workers)
        asked = []
        for name, demand in look.demands.items():
            objective = objectives.get(name) or next(iter(objectives.values()), None)
            if objective is not None:
                asked.append(Asked(demand.scaled(margin), objective))
        clearing = _clearing(asked, look.backlog_s, max(1, ready) * past.caution.backlog_share)
        batch = None
        if look.batch is not None:
            both = [*asked, Asked(look.batch, BATCH_OBJECTIVE)]
            batch = PoolModel(learner.pair, both, learner.corrections, clearing=clearing)
        return PoolAsk(
            look.model,
            PoolModel(learner.pair, asked, learner.corrections, clearing=clearing),
            look.floor,
            past.objectives.bounds,
            past.objectives.weight,
            batch,
            look.have,
        )

    def _settle(self, past: Past, look: Look, wanted: Counts, kept: Counts, seen: Observation) -> Counts:
        """Up at once; down to what a whole window needed, and sooner where the other role is short."""
        window_s = self._down_s(past)
        past.needs.append((seen.at_s, kept))
        while past.needs[0][0] < seen.at_s - window_s:
            past.needs.popleft()
        age_s = max((one.requests.age_s for one in past.classes.values()), default=seen.at_s)
        recent_s = seen.at_s - self._objectives.flip_cooldown_s
        window = most(counts for _, counts in past.needs)
        recent = most(counts for at_s, counts in past.needs if at_s >= recent_s)
        young, waits = age_s < min(FIRST_LOOK_S, window_s), self._waits(past, look)
        if young and not waits and not past.caution.alarmed:
            # What is known of the first requests is mostly assumed: nothing is done for that alone.
            return at_least(look.have, look.floor)
        if young or waits:
            window = look.have
        prefill_short, decode_short = wanted.prefill > look.have.prefill, wanted.decode > look.have.decode
        load = look.load
        past.bars.set(at_least(look.have, look.floor), wanted, load, seen.at_s)
        tried = past.bars.least(load, seen.at_s, past.caution.band)
        # What was not needed lately may be flipped where the other role is short; the rest stays for the whole window.
        to_decode, to_prefill = max(0, wanted.decode - look.have.decode), max(0, wanted.prefill - look.have.prefill)
        prefill_spare = max(recent.prefill, min(window.prefill, look.have.prefill - to_decode))
        decode_spare = max(recent.decode, min(window.decode, look.have.decode - to_prefill))
        prefill_down = max(wanted.prefill, tried.prefill, prefill_spare)
        decode_down = max(wanted.decode, tried.decode, decode_spare)
        return Counts(
            wanted.prefill if prefill_short else min(look.have.prefill, prefill_down),
            wanted.decode if decode_short else min(look.have.decode, decode_down),
        )

    def _down_s(self, past: Past) -> float:
        """Least time from any change to a drain."""
        return self._objectives.down_cooldown_s * (FIRST_DOWN if past.up_s == -math.inf else 1.0)

    def _waits(self, past: Past, look: Look) -> bool:
        """Whether prompts wait so long that nobody can be spared, whatever is expected."""
        limit_s = min((one.ttft_s for one in past.objectives.objectives.values()), default=math.inf)
        return look.backlog_s > WAITS_SHARE * limit_s * max(1, look.have.prefill)

    def _fit_budget(
        self, targets: dict[str, Counts], wanted: Mapping[str, Counts], asks: Sequence[PoolAsk]
    ) -> frozenset[str]:
        """Where one model is short, another keeps nothing that it does not need; returns which give at once."""
        over = sum(ask.gpus(targets[ask.model]) for ask in asks) - self._objectives.gpu_budget
        giving = []
        # Batch work alone is never short: what another one keeps for its own reasons comes to it when that lets go.
        for ask in (ask for ask in asks if not ask.pool.asked and over > 0):
            less = at_least(fewest(targets[ask.model], ask.now), ask.floor)
            over -= ask.gpus(targets[ask.model]) - ask.gpus(less)
            targets[ask.model] = less
        for ask in sorted(asks, key=lambda ask: (ask.weight, ask.model)):
            surplus = ask.gpus(targets[ask.model]) - ask.gpus(wanted[ask.model])
            if over <= 0:
                break
            if surplus > 0:
                targets[ask.model] = wanted[ask.model]
                giving.append(ask.model)
                over -= surplus
        return frozenset(giving)

    # -- what is done -------------------------------------------------------------------------------------

    def _act(
        self, looks: Mapping[str, Look], targets: Mapping[str, Counts], urgent: frozenset[str], seen: Observation
    ) -> tuple[list[Action], dict[str, str]]:
        settings = self._objectives
        used = sum(one.gpus for one in seen.workers)
        for model, past in self._past.items():
            used += past.coming.starts.prefill * self._gpus(model)[0] + past.coming.starts.decode * self._gpus(model)[1]
        actions: list[Action] = []
        notes: dict[str, str] = {}
        ranked = sorted(self._past.values(), key=lambda past: (-past.objectives.weight, past.objectives.model))
        for past in ranked:
            model = past.objectives.model
            look, target, at_s = looks[model], targets[model], seen.at_s
            own = [one for one in seen.workers if one.model == model]
            ceiling = at_least(
                look.floor, Counts(past.objectives.bounds.max_prefill, past.objectives.bounds.max_decode)
            )
            # A pool below its floor has lost workers: that is repaired at once.
            repair = look.have.prefill < look.floor.prefill or look.have.decode < look.floor.decode
            up = repair or at_s - past.up_s >= settings.up_cooldown_s
            past.gave_s = at_s if model in urgent else past.gave_s
            if not any(one.requests_per_s > 0.0 for one in look.demands.values()):
                # Batch work does not take back at once what another model was given: it may be short again.
                up = repair or (up and at_s - past.gave_s >= settings.down_cooldown_s)
            down = model in urgent or min(at_s - past.up_s, at_s - past.down_s) >= self._down_s(past)
            flip = at_s - past.flip_s >= settings.flip_cooldown_s
            limits = Limits(
                gpus=settings.gpu_budget - used,
                gpus_each=self._gpus(model),
                room=room(own, look.workers, past.coming.starts, ceiling),
                ups=settings.max_actions if up else 0,
                downs=max(1, math.floor(look.have.total * DRAIN_SHARE)) if down else 0,
                flips=max(1, math.floor(look.have.total * DRAIN_SHARE)) if flip else 0,
                actions=settings.max_actions - len(actions),
            )
            taken, notes[model] = steps(model, look.workers, past.coming.starts, target, limits)
            for action in taken:
                past.coming.note(action, at_s)
                if isinstance(action, Start):
                    past.up_s = at_s
                    used += self._gpus(model)[0 if action.role == Role.ROLE_PREFILL else 1]
                elif isinstance(action, Flip):
                    past.flip_s = at_s
                else:
                    past.down_s = at_s
            actions += taken
        return actions, notes

    def _gpus(self, model: str) -> tuple[int, int]:
        learner = self._past[model].learner
        return (learner.pair.prefill_gpus, learner.pair.decode_gpus) if learner is not None else (1, 1)


def _clearing(asked: list[Asked], backlog_s: float, usual: float) -> float:
    """Prefill workers that work off in time what waits beyond the usual."""
    if not asked:
        return 0.0
    limit_s = min(one.objective.ttft_s for one in asked)
    clear_s = min(max(CLEAR_LIMITS * limit_s, LEAST_CLEAR_S), MOST_CLEAR_S)
    return max(0.0, backlog_s - usual * limit_s) / clear_s


def _load(demands: Collection[Demand]) -> tuple[float, float]:
    """Prompt and answer tokens per second."""
    return (
        sum(one.requests_per_s * one.input_tokens * (1.0 - one.hit_rate) for one in demands),
        sum(one.requests_per_s * one.output_tokens for one in demands),
    )
