"""What the chart asks Prometheus for is what the cluster exposes: e2e tests ask the same of a running one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import promql_parser
import yaml

from slipstream import metric_names
from tests.support.promql import asked
from tests.unit.deploy.helm.chart import CASES, ROLES, ROOT, named, objects, of_kind

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARDS = ROOT / "deploy" / "grafana"
# The PodMonitor's, from the pod.
ADDED = {"namespace"}


def dashboard_queries() -> Iterator[str]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))


def asked_on_a_running_cluster() -> dict[str, set[str]]:
    """Metrics with labels of dashboards and alerts, which tests/e2e/test_observability.py finds on a live cluster."""
    found: dict[str, set[str]] = {}
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    for query in [*dashboard_queries(), *rules]:
        for metric, labels in asked(query):
            found.setdefault(metric, set()).update(labels)
    return found


def scaling_queries() -> list[str]:
    return [
        trigger["metadata"]["query"]
        for each in of_kind(objects(CASES["keda"]), "ScaledObject")
        for trigger in each["spec"]["triggers"]
    ]


def test_the_rule_is_the_alerts_of_the_repository_and_each_is_promql() -> None:
    rule = named(objects(CASES["watched"]), "PrometheusRule")

    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())
    for group in rule["spec"]["groups"]:
        for each in group["rules"]:
            promql_parser.parse(each["expr"])
    assert "{{ $value | humanizeDuration }}" in json.dumps(rule)


def test_the_dashboards_are_those_of_the_repository() -> None:
    maps = [
        each for each in of_kind(objects(CASES["watched"]), "ConfigMap") if "-dashboard-" in each["metadata"]["name"]
    ]
    written = {name: json.loads(text) for each in maps for name, text in each["data"].items()}

    assert written == {f"slipstream-{path.name}": json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)
    for query in dashboard_queries():
        assert list(asked(query))


def test_autoscalers_ask_for_metrics_and_labels_that_there_are() -> None:
    exposed = asked_on_a_running_cluster()
    metrics = [asked_for for query in scaling_queries() for asked_for in asked(query)]
    metrics += [
        (metric["pods"]["metric"]["name"], set())
        for each in of_kind(objects(CASES["hpa"]), "HorizontalPodAutoscaler")
        for metric in each["spec"]["metrics"]
        if metric["type"] == "Pods"
    ]

    assert len(metrics) == 4
    for metric, labels in metrics:
        assert metric in exposed
        assert labels <= exposed[metric] | ADDED | {"role"}
    assert {"role"} <= set().union(*(labels for labels in exposed.values()))


def test_autoscalers_metrics_are_in_the_table_of_names() -> None:
    ours = {alias.ours for alias in metric_names.WORKER}

    assert {"slipstream_worker_requests_waiting", "slipstream_worker_kv_usage_ratio"} <= ours


def test_each_role_is_scaled_by_its_own_workers() -> None:
    for role in ROLES:
        scaler = named(objects(CASES["keda"]), "ScaledObject", f"-{role}")
        (trigger,) = scaler["spec"]["triggers"]
        assert f'role="{role}"' in trigger["metadata"]["query"]
        assert 'namespace="llm"' in trigger["metadata"]["query"]


def test_decode_is_scaled_down_more_slowly_than_prefill() -> None:
    windows = [
        named(objects(CASES["hpa"]), "HorizontalPodAutoscaler", f"-{role}")["spec"]["behavior"]["scaleDown"]
        for role in ROLES
    ]

    assert windows[0]["stabilizationWindowSeconds"] < windows[1]["stabilizationWindowSeconds"]
