"""The live planner as metric families: what it wants, what there is, what it did, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from planner.loop import PlannerLoop
from planner.scaling import Counts

_KINDS = ("start", "drain", "flip")
_RESULTS = ("done", "failed")
_CALLS = ("workers", "hold_lease", "decide", "report")


class PlannerCollector(Collector):
    """Read from the thread that serves /metrics: everything it takes is replaced as a whole, never changed."""

    def __init__(self, loop: PlannerLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        loop, latest = self._loop, self._loop.history.latest
        yield GaugeMetricFamily(
            "slipstream_planner_leader",
            "1 while this planner holds the lease and acts. Alert when no planner does for a minute.",
            value=float(loop.leading),
        )
        yield GaugeMetricFamily(
            "slipstream_planner_dry_run", "1 while it decides and does nothing.", value=float(loop.dry_run)
        )
        yield GaugeMetricFamily("slipstream_planner_frontends", "Frontends that report.", value=loop.frontends)
        yield _counts(
            "slipstream_planner_target_workers",
            "Workers wanted by the last decision, by model and role.",
            latest.decision.targets if latest else {},
        )
        yield _counts(
            "slipstream_planner_actual_workers",
            "Ready workers when that was decided. Far from the target for long: starts fail, or there is no room.",
            latest.actual if latest else {},
        )
        yield CounterMetricFamily(
            "slipstream_planner_decisions", "Decisions made.", value=latest.number if latest else 0
        )
        actions = CounterMetricFamily(
            "slipstream_planner_actions",
            "Workers started, drained and flipped, by result. A steady rate of all three: the policy oscillates.",
            labels=("kind", "result"),
        )
        for kind in _KINDS:
            for result in _RESULTS:
                actions.add_metric((kind, result), loop.acted[kind, result])
        yield actions
        replaced = CounterMetricFamily(
            "slipstream_health_replacements",
            "Workers started in the place of sick ones, by result. Failed ones for long: there is no room for another.",
            labels=("result",),
        )
        for result in _RESULTS:
            replaced.add_metric((result,), loop.replaced[result])
        yield replaced
        errors = CounterMetricFamily(
            "slipstream_planner_errors",
            "Failures of the scaler (workers, hold_lease, report) and of the policy (decide). Alert on any rate.",
            labels=("call",),
        )
        for call in _CALLS:
            errors.add_metric((call,), loop.errors[call])
        yield errors


def _counts(name: str, text: str, by_model: Mapping[str, Counts]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("model", "role"))
    for model, counts in sorted(by_model.items()):
        family.add_metric((model, "prefill"), counts.prefill)
        family.add_metric((model, "decode"), counts.decode)
    return family
