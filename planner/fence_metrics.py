"""Sick workers as metric families: who is fenced, who should be and is not, and what is left of the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from planner.fence_keeper import FenceKeeper
from planner.fencing import HELD
from slipstream.v1.registry_pb2 import HealthState, Role, WorkerState


class FenceCollector(Collector):
    """Read from the thread that serves /metrics: everything it takes is replaced as a whole, never changed."""

    def __init__(self, keeper: FenceKeeper) -> None:
        self._keeper = keeper

    def collect(self) -> Iterable[Metric]:
        keeper, workers = self._keeper, self._keeper.posted.workers
        health = GaugeMetricFamily(
            "slipstream_registry_workers_by_health",
            "Workers with a lease, by role, model and what they say of their health.",
            labels=("role", "model", "health"),
        )
        counts = Counter((one.role, one.model, one.health.state) for one in workers)
        for (role, model, state), count in sorted(counts.items()):
            name = HealthState.Name(state).lower() if state else "unwatched"
            health.add_metric((Role.Name(role).removeprefix("ROLE_").lower(), model, name), count)
        yield health
        yield GaugeMetricFamily(
            "slipstream_health_fenced_workers",
            "Workers that get nothing new because they are sick.",
            value=sum(one.state == WorkerState.FENCED for one in workers),
        )
        held = GaugeMetricFamily(
            "slipstream_health_sick_in_service",
            "Sick workers that stay in service, by what keeps them there: last (no other is healthy), share and budget "
            "(as many are fenced as may be), off. Above zero for long: look at the workers, not at the limits.",
            labels=("reason",),
        )
        words = Counter(keeper.held.values())
        for word in HELD:
            held.add_metric((word,), words[word])
        yield held
        yield GaugeMetricFamily(
            "slipstream_health_budget_left", "Workers that may still be fenced within this hour.", value=keeper.left
        )
        orders = CounterMetricFamily(
            "slipstream_health_orders",
            "Workers that were fenced, or freed because they are well again, by result.",
            labels=("kind", "result"),
        )
        for kind in ("fence", "free"):
            for result in ("done", "failed"):
                orders.add_metric((kind, result), keeper.done[kind, result])
        yield orders
        ratios = GaugeMetricFamily(
            "slipstream_health_slowness_ratio",
            "How long a worker takes for the same work, over the median of its peers; health.slow_factor is the limit.",
            labels=("worker",),
        )
        for worker_id, ratio in sorted(keeper.speeds.ratios().items()):
            ratios.add_metric((worker_id,), ratio)
        yield ratios
