"""What an operator sees of a real cluster: dashboards that ask for what there is, one trace a request, its log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.dashboards import DASHBOARDS, FOLDER
from deploy.grafana_json import render
from slipstream.v1.registry_pb2 import Role
from tests.e2e.conftest import tracing_flags
from tests.support.cluster import Cluster, wait_for
from tests.support.otlp_collector import Collector
from tests.support.promql import asked

ALERTS = FOLDER.parent / "prometheus" / "alerts.yaml"
PARENT = "00f067aa0ba902b7"
# What appears only when something breaks, with the labels that it then has.
ONLY_IN_TROUBLE = {
    "slipstream_frontend_broken_streams_total": {"face", "endpoint", "model", "code"},
    "slipstream_frontend_refused_total": {"class", "tenant", "reason"},
    "slipstream_frontend_preempted_total": {"tenant"},
    "slipstream_kv_path_broken": {"role", "worker", "peer"},
    # Where there are certificates.
    "slipstream_certificate_seconds_to_expiry": {"certificate"},
    # Where there is a GPU, and where a planner can start workers.
    "slipstream_health_slowness_ratio": {"worker"},
    "slipstream_device_lost": {"role", "worker", "gpu", "uuid"},
    "slipstream_device_ecc_uncorrected_errors_total": {"role", "worker", "gpu", "uuid"},
    "slipstream_health_replacements_total": {"result"},
}

Labels = dict[str, set[str]]


@pytest.fixture(scope="module", params=["vllm", "simulated"])
def cluster(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Cluster]:
    """With either engine: they tell the same things."""
    if request.param == "vllm":
        yield request.getfixturevalue("real_cluster")
        return
    flags = ["--engine", "simulated", "--served-model-name", "tiny", *tracing_flags(collector)]
    with Cluster(tiny_model, tmp_path_factory.mktemp("simulated") / "run", *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.http_url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, prompt: str, **headers: str) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True}
    return client.post("/v1/completions", json=body, headers=headers).raise_for_status()


@pytest.fixture(scope="module")
def exposed(cluster: Cluster, client: httpx.Client) -> Labels:
    """Every series of the cluster's pages by name: the labels that some sample of it has. A request was made before."""
    ask(client, "How many stars are there in the sky tonight?")
    worker_pages = [cluster.worker(role).metrics_url for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE)]
    found: Labels = {}
    for url in (f"{cluster.http_url}/metrics", cluster.control_plane_metrics, *worker_pages):
        for family in text_string_to_metric_families(httpx.get(url, timeout=10).raise_for_status().text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> list[tuple[str, str]]:
    """Every query of every dashboard, and every alert's, with its place."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            found += [(f"{path.name}: {panel['title']}", target["expr"]) for target in panel.get("targets", ())]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        found += [(f"{ALERTS.name}: {rule['alert']}", rule["expr"]) for rule in group["rules"]]
    return found


def variables() -> list[tuple[str, str]]:
    """What the dashboards' variables take their values from: a metric and a label."""
    found = set()
    for path in FOLDER.glob("*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if match := re.fullmatch(r"label_values\((\w+), (\w+)\)", variable.get("definition", "")):
                found.add((match[1], match[2]))
    return sorted(found)


def lacking(exposed: Labels, metric: str, labels: set[str]) -> str:
    """What a query asks for and the cluster does not have; empty when it has it all."""
    if metric.startswith("slipstream_planner_"):
        return ""  # none plans here: tests/unit/deploy/test_planner_dashboard.py
    if metric not in exposed:
        known = ONLY_IN_TROUBLE.get(metric)
        if known is None:
            return f"no metric {metric}"
        return "" if labels <= known else f"{metric} has no label {labels - known}"
    missing = labels - exposed[metric]
    return f"{metric} has no label {sorted(missing)}, but {sorted(exposed[metric])}" if missing else ""


def test_every_query_of_dashboards_and_alerts_asks_for_what_the_cluster_exposes(exposed: Labels) -> None:
    wrong = [
        f"{place}: {problem} in {expression}"
        for place, expression in queries()
        for metric, labels in asked(expression)
        if (problem := lacking(exposed, metric, labels))
    ]
    assert wrong == []
    assert len(queries()) > 80


def test_a_worker_tells_what_its_start_was_made_of(cluster: Cluster) -> None:
    for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
        startup = cluster.worker(role).startup
        parts = [startup.weights, startup.kv_cache, startup.transfer, startup.warmup]
        if cluster.worker(role).device != "simulated":
            assert min(parts) > 0
        assert 0 < startup.imports + startup.model + startup.engine + sum(parts) < startup.total


def test_every_variable_of_a_dashboard_has_values(exposed: Labels) -> None:
    assert variables()
    assert [one for one in variables() if lacking(exposed, one[0], {one[1]})] == []


def test_the_check_itself_sees_what_is_not_there(exposed: Labels) -> None:
    for expression in ("sum(slipstream_nothing)", "sum by (colour) (slipstream_worker_requests_running)"):
        assert [True for metric, labels in asked(expression) if lacking(exposed, metric, labels)]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_dashboards_in_the_folder_are_those_that_are_written_here(name: str) -> None:
    written = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert written == render(DASHBOARDS[name]), "run `python -m deploy.dashboards`"


def test_vllms_and_dynamos_dashboards_find_their_names(exposed: Labels) -> None:
    for name in ("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum"):
        assert exposed[f"vllm:{name}"] >= {"model_name"}
        assert exposed[f"dynamo_frontend_{name}"] >= {"model"}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total"):
        assert exposed[f"vllm:{name}"] >= {"model_name", "engine"}


def test_a_request_is_one_trace_across_frontend_prefill_and_decode(client: httpx.Client, collector: Collector) -> None:
    trace_id = uuid.uuid4().hex
    ask(client, "A prompt that nobody has asked before, to be handed over.", traceparent=f"00-{trace_id}-{PARENT}-01")

    spans = collector.until(15, trace_id=trace_id)
    tree = _tree(spans)
    assert tree == {
        ("slipstream-frontend", "POST completions"): {
            ("slipstream-frontend", "receive"): {},
            ("slipstream-frontend", "tokenize"): {},
            ("slipstream-frontend", "route"): {},
            ("slipstream-frontend", "prefill"): {
                ("slipstream-prefill", "slipstream.v1.PrefillWorker/Prefill"): {
                    ("slipstream-prefill", "queue"): {},
                    ("slipstream-prefill", "prefill"): {},
                    ("slipstream-prefill", "transfer"): {},
                }
            },
            ("slipstream-frontend", "decode"): {
                ("slipstream-decode", "slipstream.v1.DecodeWorker/Decode"): {
                    ("slipstream-decode", "transfer"): {},
                    ("slipstream-decode", "prefill"): {},
                    ("slipstream-decode", "decode"): {},
                }
            },
            ("slipstream-frontend", "stream"): {},
        }
    }
    assert all(spans[0].start_ns <= span.start_ns <= span.end_ns for span in spans)
    (transfer,) = [span for span in spans if (span.service, span.name) == ("slipstream-decode", "transfer")]
    assert transfer.attributes["slipstream.kv.bytes"] > 0


def _tree(spans: list[Any], parent: str = PARENT) -> dict[tuple[str, str], Any]:
    children = [span for span in spans if span.parent == parent]
    return {(span.service, span.name): _tree(spans, span.span_id) for span in children}


def test_the_log_names_the_request_and_its_trace(cluster: Cluster, client: httpx.Client) -> None:
    trace_id = uuid.uuid4().hex
    ask(client, "How many stars?", **{"x-request-id": "starry", "traceparent": f"00-{trace_id}-{PARENT}-01"})

    def line() -> str | None:
        return next((one for one in _log(cluster.run_folder / "frontend.log") if "request_id=starry-" in one), None)

    said = wait_for("the request's line", line, timeout_s=5)
    for fact in (f"trace_id={trace_id}", "status=200", "path=/v1/completions", "output_length=8", "ttft_s=", "route="):
        assert fact in said


def _log(path: Path) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace")).splitlines()


def test_top_sees_the_real_workers_and_their_hit_rates(cluster: Cluster, client: httpx.Client) -> None:
    for _ in range(3):
        ask(client, "The same long question again and again, so that its blocks are cached by now, are they not?")
    time.sleep(1.2)  # the registry hears of load each second
    command = [sys.executable, "-m", "slipstream", "top", "--once", "--json", "--interval-s", "0.5"]
    where = ["--control-plane", cluster.control_plane, "--frontend", cluster.http_url]
    printed = subprocess.run([*command, *where], capture_output=True, text=True, timeout=60, check=True)

    shown = json.loads(printed.stdout)
    assert [(row["role"], row["state"]) for row in shown["workers"]] == [("prefill", "ready"), ("decode", "ready")]
    assert all(0 <= row["hit_rate"] <= 1 for row in shown["workers"])
    assert shown["problems"] == []
