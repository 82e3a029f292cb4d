"""The live planner as metric families: what it wants, what there is, what it did, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from planner.loop import PlannerLoop
from planner.scaling import Counts
from planner.traffic import CLASSES

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
        if latest is not None:
            yield from _numbers(loop, latest.decision.numbers)
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


_BY_MODEL = {
    "predicted_ttft_s": ("predicted_ttft_seconds", "Predicted of the ready workers, at the objective's percentile."),
    "predicted_itl_s": ("predicted_itl_seconds", "Predicted of the ready workers, at the objective's percentile."),
    "caution": ("caution", "1: more requests were late than the objective allows; below 0: fewer for long."),
    "backlog_s": ("backlog_seconds", "Prompts that wait, in seconds of one worker's time."),
}
_BY_CLASS = {
    "ttft_s": ("seen_ttft_seconds", "Seen in the last interval, at the objective's percentile; absent without any."),
    "itl_s": ("seen_itl_seconds", "Seen in the last interval, at the objective's percentile; absent without any."),
    "ttft_limit_s": ("ttft_limit_seconds", "What the objective asks for."),
    "itl_limit_s": ("itl_limit_seconds", "What the objective asks for."),
    "forecast_requests_per_s": ("forecast_requests_per_second", "What is prepared for, within the horizon."),
    "requests_per_s": ("seen_requests_per_second", "What came, over a quarter of an hour."),
}


def _numbers(loop: PlannerLoop, numbers: Mapping[str, float]) -> Iterable[Metric]:
    """Of what the last decision was computed from, what is worth a line in a picture."""
    models = [one.model for one in loop.objectives.models]
    for key, (name, text) in _BY_MODEL.items():
        family = GaugeMetricFamily(f"slipstream_planner_{name}", text, labels=("model",))
        for model in models:
            if (value := numbers.get(f"{model}.{key}")) is not None:
                family.add_metric((model,), value)
        yield family
    for key, (name, text) in _BY_CLASS.items():
        family = GaugeMetricFamily(f"slipstream_planner_{name}", text, labels=("model", "class"))
        for model in models:
            for service_class in CLASSES:
                if (value := numbers.get(f"{model}.{service_class}.{key}")) is not None:
                    family.add_metric((model, service_class), value)
        yield family


def _counts(name: str, text: str, by_model: Mapping[str, Counts]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("model", "role"))
    for model, counts in sorted(by_model.items()):
        family.add_metric((model, "prefill"), counts.prefill)
        family.add_metric((model, "decode"), counts.decode)
    return family
