"""How others decide on worker counts, as scaling policies for the simulator: their published rules on our figures.

Each sees what our planner sees, has the same budget and starts with the same workers. None flips roles: on Kubernetes
a pod of one role is no pod of the other. Dynamo's rules have a module of their own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from planner.observation import Observation, Traffic, WorkerSeen
from planner.scaling import Action, Counts, Decision, Drain, Start
from slipstream.v1.registry_pb2 import Role, WorkerState

HPA_SYNC_S = 15.0
HPA_TOLERANCE = 0.1
HPA_DOWN_WINDOW_S = 300.0
HPA_UP_LEAST, HPA_UP_SHARE = 4, 1.0
"""Kubernetes' horizontal pod autoscaler: its defaults. Up by at most 4 pods or 100% a sync, whatever is more."""

HPA_TARGET = 0.7
"""Of utilization; Kubernetes has no default. Busy time of prefill workers, KV use of decode workers."""

TOKEN_WAIT_S = 1.5
TOKEN_KV_USE = 0.8
"""llm-d's token-aware rule: seconds of queued prompt work a prefill pod, KV use of decode pods."""

SLO_TARGET, SLO_SHRINK = 0.55, 0.40
SLO_CLAMP, SLO_SMOOTH_S, SLO_WINDOW_S = 2.0, 45.0, 60.0
"""llm-d's SLO-aware rule: P90 over a minute against the SLO, at most 2, averaged over 45 s."""

KEDA_UP_S, KEDA_DOWN_S = 180.0, 300.0
"""llm-d's guides: one pod more in 180 s, one less in 300 s."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What a rule decides on: one model, and how many workers of it fit into the budget."""

    model: str
    workers: int


def counts_of(seen: Observation, model: str) -> Counts:
    """Workers that run or start; not those that drain."""
    mine = [one for one in seen.workers if one.model == model and one.state != WorkerState.DRAINING]
    prefill = sum(one.role == Role.ROLE_PREFILL for one in mine)
    return Counts(prefill, len(mine) - prefill)


def ready(seen: Observation, model: str, role: Role.ValueType) -> list[WorkerSeen]:
    """Those whose metrics a rule averages."""
    return [one for one in seen.workers if one.model == model and one.role == role and one.state == WorkerState.READY]


def traffic_of(seen: Observation, model: str) -> Traffic:
    """Of all classes together."""
    total = Traffic()
    for (name, _), one in seen.traffic.items():
        if name == model:
            total.merge(one)
    return total


def towards(seen: Observation, pool: Pool, wanted: Counts, reason: str) -> Decision:
    """Starts and drains that lead there, at least one of each role, as far as the budget reaches.

    Where it does not, what is there stays and the growth of both is cut, prefill's first when it is the larger.
    """
    now = counts_of(seen, pool.model)
    prefill, decode = max(1, wanted.prefill), max(1, wanted.decode)
    while prefill + decode > pool.workers and (prefill > max(1, now.prefill) or decode > max(1, now.decode)):
        if prefill - now.prefill > decode - now.decode:
            prefill -= 1
        else:
            decode -= 1
    actions: list[Action] = []
    for role, have, want in ((Role.ROLE_PREFILL, now.prefill, prefill), (Role.ROLE_DECODE, now.decode, decode)):
        actions += [Start(pool.model, role)] * (want - have)
        actions += [Drain(one.worker_id) for one in _least_loaded(seen, pool.model, role)[: max(0, have - want)]]
    return Decision(seen.at_s, {pool.model: Counts(prefill, decode)}, tuple(actions), reason)


def _least_loaded(seen: Observation, model: str, role: Role.ValueType) -> list[WorkerSeen]:
    """Pods that are not ready go first, as in a ReplicaSet."""
    mine = (one for one in seen.workers if one.model == model and one.role == role)
    staying = [one for one in mine if one.state != WorkerState.DRAINING]
    return sorted(staying, key=lambda one: (one.state == WorkerState.READY, one.running + one.waiting, one.worker_id))


class Static:
    """Always the same counts."""

    def __init__(self, pool: Pool, counts: Counts) -> None:
        self._pool, self._counts = pool, counts

    def decide(self, seen: Observation) -> Decision:
        return towards(seen, self._pool, self._counts, "static")


class _Steady:
    """How a HorizontalPodAutoscaler damps one role's wishes: the highest of the last minutes wins on the way down."""

    def __init__(self) -> None:
        self._wishes: deque[tuple[float, int]] = deque()

    def settle(self, now_s: float, have: int, wish: int) -> int:
        self._wishes.append((now_s, wish))
        while self._wishes[0][0] < now_s - HPA_DOWN_WINDOW_S:
            self._wishes.popleft()
        up = min(wish, have + max(HPA_UP_LEAST, math.ceil(have * HPA_UP_SHARE)))
        return up if up > have else min(have, max(one for _, one in self._wishes))


class Hpa:
    """Kubernetes' rule, one autoscaler a role: `ceil(replicas * utilization / target)` outside of the tolerance."""

    def __init__(self, pool: Pool, target: float = HPA_TARGET) -> None:
        self._pool, self._target = pool, target
        self._steady = {Role.ROLE_PREFILL: _Steady(), Role.ROLE_DECODE: _Steady()}
        self._means: dict[Role.ValueType, float] = {}
        self._samples: list[tuple[float, float]] = []
        self._due_s = 0.0

    def decide(self, seen: Observation) -> Decision:
        now, model = counts_of(seen, self._pool.model), self._pool.model
        prefill, decode = ready(seen, model, Role.ROLE_PREFILL), ready(seen, model, Role.ROLE_DECODE)
        self._samples.append((_mean(one.prefill_busy for one in prefill), _mean(one.kv_use for one in decode)))
        if seen.at_s < self._due_s:
            return Decision(seen.at_s, {model: now})
        self._due_s = seen.at_s + HPA_SYNC_S
        busy, kv_use = (_mean(values) for values in zip(*self._samples, strict=True))
        self._samples.clear()
        wanted = Counts(
            self._wish(Role.ROLE_PREFILL, seen.at_s, now.prefill, len(prefill), busy),
            self._wish(Role.ROLE_DECODE, seen.at_s, now.decode, len(decode), kv_use),
        )
        return towards(seen, self._pool, wanted, f"utilization {busy:.2f} and {kv_use:.2f}")

    def _wish(self, role: Role.ValueType, now_s: float, have: int, measured: int, use: float) -> int:
        ratio = use / self._target
        # Pods without metrics yet count as unused when it grows: the controller's own damping.
        wish = have if abs(ratio - 1) <= HPA_TOLERANCE or not measured else math.ceil(measured * ratio)
        if ratio > 1 and measured < have:
            wish = max(have, wish)
        return self._steady[role].settle(now_s, have, wish)


class _OneAtATime:
    """One pod more or less, and then none for a while."""

    def __init__(self) -> None:
        self._up_s = self._down_s = -math.inf

    def settle(self, now_s: float, have: int, wish: int) -> int:
        if wish > have and now_s - self._up_s >= KEDA_UP_S:
            self._up_s = now_s
            return have + 1
        if wish < have and now_s - max(self._down_s, self._up_s) >= KEDA_DOWN_S:
            self._down_s = now_s
            return have - 1
        return have


class LlmDTokenAware:
    """llm-d's token-aware autoscaling.

    Args:
        prefill_tokens_per_s: of one worker: the one figure that its guide has users measure.
    """

    def __init__(self, pool: Pool, prefill_tokens_per_s: float) -> None:
        self._pool, self._tokens_per_s = pool, prefill_tokens_per_s
        self._prefill, self._decode = _OneAtATime(), _OneAtATime()

    def decide(self, seen: Observation) -> Decision:
        model, now = self._pool.model, counts_of(seen, self._pool.model)
        prefill, decode = ready(seen, model, Role.ROLE_PREFILL), ready(seen, model, Role.ROLE_DECODE)
        tokens = sum(one.waiting_tokens for one in prefill) + traffic_of(seen, model).queued_tokens
        kv_use = _mean(one.kv_use for one in decode)
        wanted = Counts(
            self._prefill.settle(seen.at_s, now.prefill, max(1, math.ceil(tokens / self._tokens_per_s / TOKEN_WAIT_S))),
            self._decode.settle(seen.at_s, now.decode, max(1, math.ceil(len(decode) * kv_use / TOKEN_KV_USE))),
        )
        return towards(seen, self._pool, wanted, f"{tokens} tokens wait, KV use {kv_use:.2f}")


class _Saturation:
    """One latency's P90 over a minute against its SLO, clamped and averaged."""

    def __init__(self, slo_s: float) -> None:
        self._slo_s = slo_s
        self._window: deque[tuple[float, Traffic]] = deque()
        self._raw: deque[tuple[float, float]] = deque()

    def of(self, now_s: float, traffic: Traffic, *, first: bool) -> float:
        self._window.append((now_s, traffic))
        while self._window[0][0] <= now_s - SLO_WINDOW_S:
            self._window.popleft()
        merged = Traffic()
        for _, one in self._window:
            merged.merge(one)
        p90_s = (merged.ttft if first else merged.itl).percentile_s(90.0)
        self._raw.append((now_s, min(p90_s / self._slo_s, SLO_CLAMP)))
        while self._raw[0][0] <= now_s - SLO_SMOOTH_S:
            self._raw.popleft()
        return _mean(raw for _, raw in self._raw)


class LlmDSloAware:
    """llm-d's SLO-aware autoscaling; a role's own latency where its guide takes the worse of both for one pool."""

    def __init__(self, pool: Pool, ttft_s: float, itl_s: float) -> None:
        self._pool = pool
        self._ttft, self._itl = _Saturation(ttft_s), _Saturation(itl_s)
        self._prefill, self._decode = _OneAtATime(), _OneAtATime()

    def decide(self, seen: Observation) -> Decision:
        model, now = self._pool.model, counts_of(seen, self._pool.model)
        traffic = traffic_of(seen, model)
        first = self._ttft.of(seen.at_s, traffic, first=True)
        between = self._itl.of(seen.at_s, traffic, first=False)
        wanted = Counts(
            self._prefill.settle(seen.at_s, now.prefill, _slo_wish(now.prefill, first)),
            self._decode.settle(seen.at_s, now.decode, _slo_wish(now.decode, between)),
        )
        return towards(seen, self._pool, wanted, f"saturation {first:.2f} and {between:.2f}")


def _slo_wish(have: int, saturation: float) -> int:
    wish = max(1, math.ceil(have * saturation / SLO_TARGET))
    return have if wish < have and saturation >= SLO_SHRINK else wish


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
