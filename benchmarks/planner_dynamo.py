"""Dynamo's two rules for worker counts, after ai-dynamo/dynamo's planner (`core/load_scaling.py`,
`core/throughput_scaling.py`, `config/defaults.py`, 2026-07), as scaling policies for the simulator.

Both estimate latencies with a model of the engine that Dynamo fits to what it sees; here they get the very profile by
which the simulated engine computes, which is better than any fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.planner_baselines import Pool, counts_of, ready, towards, traffic_of
from planner.observation import Observation, Traffic
from planner.scaling import Counts, Decision
from slipstream.performance import Predictor
from slipstream.v1.registry_pb2 import Role

LOAD_INTERVAL_S = 5.0
THROUGHPUT_INTERVAL_S = 180.0
SENSITIVITY = 0.80
"""`load_adjustment_interval`, `throughput_adjustment_interval`, `load_scaling_down_sensitivity`."""

KALMAN_LEVEL, KALMAN_TREND, KALMAN_NOISE, KALMAN_POINTS = 1.0, 0.1, 10.0, 5
"""Of its Kalman predictor: `kalman_q_level`, `kalman_q_trend`, `kalman_r`, `kalman_min_points`."""


@dataclass(frozen=True, slots=True)
class Sla:
    ttft_s: float
    itl_s: float


class DynamoLoad:
    """Its load-based rule: one more when every worker's estimate breaks the SLA, one less when the survivors' would
    not, with the load of N workers on N - 1."""

    def __init__(self, pool: Pool, predictor: Predictor, sla: Sla) -> None:
        self._pool, self._predict, self._sla = pool, predictor, sla
        self._seen = Traffic()
        self._due_s = 0.0

    def decide(self, seen: Observation) -> Decision:
        model, now = self._pool.model, counts_of(seen, self._pool.model)
        traffic = traffic_of(seen, model)
        self._seen.merge(traffic)
        prefill, decode = ready(seen, model, Role.ROLE_PREFILL), ready(seen, model, Role.ROLE_DECODE)
        starting = len(prefill) != now.prefill or len(decode) != now.decode
        if seen.at_s < self._due_s or starting or not self._seen.arrivals:
            return Decision(seen.at_s, {model: now}, reason="a worker starts" if starting else "")
        self._due_s = seen.at_s + LOAD_INTERVAL_S
        # What waits in our frontends, for either role, would wait at its workers, and count as their queues.
        queued = [one.waiting_tokens + traffic.queued_tokens / len(prefill) for one in prefill]
        contexts = [
            (
                one.running + one.waiting + traffic.queued // len(decode),
                one.context_tokens + one.waiting_tokens + traffic.queued_tokens / len(decode),
                one.blocks,
            )
            for one in decode
        ]
        wanted = Counts(self._prefill(queued, now.prefill), self._decode(contexts, now.decode))
        decision = towards(seen, self._pool, wanted, "load")
        if self._seen.arrivals > 1000:
            self._seen = traffic
        return decision

    def _prefill(self, queued: list[float], have: int) -> int:
        own_tokens = self._seen.mean_input_tokens * (1 - self._seen.hit_rate)
        own_s = self._ttft_s(0.0, own_tokens)
        if all(self._ttft_s(tokens, own_tokens) > self._sla.ttft_s for tokens in queued):
            return have + 1
        budget_s = (self._sla.ttft_s - own_s) * SENSITIVITY
        if have < 2 or budget_s <= 0:
            return have
        after = have / (have - 1)
        fits = all(self._ttft_s(tokens * after, own_tokens) - own_s < budget_s for tokens in queued)
        return have - 1 if fits else have

    def _ttft_s(self, queued_tokens: float, own_tokens: float) -> float:
        step = self._predict.profile.step_tokens
        whole, rest = divmod(queued_tokens + own_tokens, step)
        return whole * self._predict.prefill_s(step) + self._predict.prefill_s(rest)

    def _decode(self, contexts: list[tuple[int, float, int]], have: int) -> int:
        mean_length = self._seen.mean_input_tokens + self._seen.mean_output_tokens / 2
        if all(self._itl_s(running + 1, tokens + mean_length) > self._sla.itl_s for running, tokens, _ in contexts):
            return have + 1
        if have < 2:
            return have
        after = have / (have - 1)
        for running, tokens, blocks in contexts:
            if tokens * after >= blocks * self._predict.profile.block_tokens:
                return have
            if self._itl_s(running * after + 1, tokens * after + mean_length) >= self._sla.itl_s * SENSITIVITY:
                return have
        return have - 1

    def _itl_s(self, batch: float, tokens: float) -> float:
        return self._predict.decode_s(batch, tokens / batch)


class DynamoThroughput:
    """Its throughput-based rule: the next interval's forecast demand over what one worker does within the SLA."""

    def __init__(self, pool: Pool, predictor: Predictor, sla: Sla) -> None:
        self._pool, self._predict, self._sla = pool, predictor, sla
        self._traffic = Traffic()
        self._began_s: float | None = None
        self._rate, self._input, self._output = Kalman(), Kalman(), Kalman()

    def decide(self, seen: Observation) -> Decision:
        model, now = self._pool.model, counts_of(seen, self._pool.model)
        self._traffic.merge(traffic_of(seen, model))
        if self._began_s is None:
            self._began_s = seen.at_s - seen.interval_s
        span_s = seen.at_s - self._began_s
        if span_s < THROUGHPUT_INTERVAL_S or not self._traffic.finished or not self._traffic.arrivals:
            return Decision(seen.at_s, {model: now})
        traffic, self._traffic, self._began_s = self._traffic, Traffic(), seen.at_s
        requests = self._rate.next_after(float(traffic.arrivals))
        input_tokens = self._input.next_after(traffic.mean_input_tokens)
        output_tokens = self._output.next_after(traffic.mean_output_tokens)
        demand = requests / span_s
        wanted = Counts(
            math.ceil(demand / self._prefill_rate(input_tokens * (1 - traffic.hit_rate))),
            math.ceil(demand / self._decode_rate(input_tokens + output_tokens / 2, output_tokens)),
        )
        return towards(seen, self._pool, self._within_budget(wanted), f"{demand:.2f} req/s forecast")

    def _prefill_rate(self, tokens: float) -> float:
        """Requests a second of one worker: one prompt after the other."""
        return 1 / self._predict.prefill_s(max(1.0, tokens))

    def _decode_rate(self, context_tokens: float, output_tokens: float) -> float:
        """At the largest batch that keeps the ITL and fits into the KV cache."""
        profile = self._predict.profile
        most = max(1, min(profile.max_running, int(profile.blocks * profile.block_tokens / max(1.0, context_tokens))))
        low, high, best = 1, most, 1
        while low <= high:
            middle = (low + high) // 2
            if self._predict.decode_s(middle, context_tokens) <= self._sla.itl_s:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best / (max(1.0, output_tokens) * self._predict.decode_s(best, context_tokens))

    def _within_budget(self, wanted: Counts) -> Counts:
        """Scaled down in proportion, decode gets the rest."""
        prefill, decode = max(1, wanted.prefill), max(1, wanted.decode)
        if prefill + decode <= self._pool.workers:
            return Counts(prefill, decode)
        share = self._pool.workers / (prefill + decode)
        prefill = max(1, min(self._pool.workers - 1, math.floor(prefill * share)))
        return Counts(prefill, self._pool.workers - prefill)


class Kalman:
    """A level and its trend, filtered; before it has enough points, the last one."""

    def __init__(self) -> None:
        self._points = 0
        self._level, self._trend = 0.0, 0.0
        self._spread = (KALMAN_NOISE, 0.0, KALMAN_NOISE)  # variances of level, both, trend

    def next_after(self, value: float) -> float:
        """Takes the newest value in; returns the next one's forecast, never below 0."""
        self._points += 1
        if self._points == 1:
            self._level = value
            return value
        level, both, trend = self._spread
        # Forward by one: level += trend.
        level, both = level + 2 * both + trend + KALMAN_LEVEL, both + trend
        trend += KALMAN_TREND
        self._level += self._trend
        gain_level, gain_trend = level / (level + KALMAN_NOISE), both / (level + KALMAN_NOISE)
        missed = value - self._level
        self._level += gain_level * missed
        self._trend += gain_trend * missed
        self._spread = (level * (1 - gain_level), both * (1 - gain_level), trend - gain_trend * both)
        return max(0.0, self._level + self._trend) if self._points >= KALMAN_POINTS else value
