"""The planner's dashboard asks for what a planner that has decided tells."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from deploy.planner_dashboard import PLANNER
from planner.loop import PlannerLoop
from planner.loop_metrics import PlannerCollector
from planner.no_scaler import NoScaler
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.policy import SloPolicy
from planner.traffic import SILENT_AFTER_S
from simulator.run import profile_named
from slipstream.v1.planner_pb2 import LatencyHistogram, TrafficPart, TrafficReport
from slipstream.v1.registry_pb2 import READY, ROLE_DECODE, ROLE_PREFILL, WorkerRecord, WorkerSet
from tests.support.promql import asked

OBJECTIVES = PlannerObjectives((ModelObjectives("a.b/m", {"realtime": Objective(2.0, 0.05)}),), gpu_budget=4)


async def test_every_query_asks_for_what_a_planner_tells() -> None:
    now_s = 0.0
    workers = [
        WorkerRecord(worker_id="p", role=ROLE_PREFILL, state=READY, model="a.b/m"),
        WorkerRecord(worker_id="d", role=ROLE_DECODE, state=READY, model="a.b/m"),
    ]
    profile = profile_named("qwen3-32b-h200-tp1")
    loop = PlannerLoop(
        OBJECTIVES,
        lambda objectives: SloPolicy(objectives, {"a.b/m": profile}),
        NoScaler(),
        lambda: WorkerSet(workers=workers, settled=True),
        dry_run=True,
        clock=lambda: now_s,
    )
    now_s = SILENT_AFTER_S + 1.0
    latency = LatencyHistogram(buckets=[40], counts=[5], total_s=1.0)
    part = TrafficPart(
        model="a.b/m", service_class="realtime", arrivals=5, input_tokens=5000, ttft=latency, itl=latency
    )
    loop.take_report(TrafficReport(frontend_id="f", sequence=1, interval_s=1.0, parts=[part]))
    assert await loop.step() is not None
    registry = CollectorRegistry()
    registry.register(PlannerCollector(loop))
    exposed: dict[str, set[str]] = {}
    families: list[Metric] = list(registry.collect())
    for sample in (sample for family in families for sample in family.samples):
        assert sample.value == sample.value
        exposed.setdefault(sample.name, set()).update(sample.labels)
    queries = [query.expr for row in PLANNER.rows for panel in row.panels for query in panel.queries]
    wanted = [(metric, labels) for query in queries for metric, labels in asked(query)]
    assert [metric for metric, labels in wanted if not labels <= exposed.get(metric, set())] == []
    assert len(wanted) > 14
