"""The control plane over HTTP, for Prometheus: its own /metrics, and /targets, where every worker's are found.

Workers come and go on ports of their own; a Prometheus that asks /targets (`http_sd_configs`) follows them without
a list of them anywhere. Both answers are made from the set of workers that was posted last, which never changes: the
thread that serves them shares nothing with the event loop but the reference to it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from planner.service import RegistryService
from slipstream.errors import StartupError
from slipstream.metrics_server import MetricsHttpServer, StartResponse, WsgiApp
from slipstream.security.expiry import CertificateCollector
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState


class RegistryCollector(Collector):
    """The registry as metric families."""

    def __init__(self, service: RegistryService) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        service = self._service
        workers = GaugeMetricFamily(
            "slipstream_registry_workers",
            "Workers with a lease, by role, state and model. Alert when fewer of a role are ready than wanted.",
            labels=("role", "state", "model"),
        )
        posted = service.posted
        for labels, count in sorted(Counter(map(_kind, posted.workers)).items()):
            workers.add_metric(labels, count)
        yield workers
        yield GaugeMetricFamily(
            "slipstream_registry_settled",
            "0 for one lease period after a start, while workers that are there may not be known yet.",
            value=float(posted.settled),
        )
        yield GaugeMetricFamily(
            "slipstream_registry_watchers", "Frontends and workers that follow the registry.", value=service.watchers
        )
        yield CounterMetricFamily(
            "slipstream_registry_registrations", "Registrations and renewals taken.", value=service.registrations_total
        )
        yield CounterMetricFamily(
            "slipstream_registry_expirations",
            "Workers forgotten because they did not renew. Anything but a killed worker: look at its log and its load.",
            value=service.expirations_total,
        )


@contextmanager
def serving_metrics(service: RegistryService, host: str, port: int, more: Iterable[Collector] = ()) -> Iterator[str]:
    """Serve both in a thread while the block runs; yields the URL of /metrics.

    Args:
        more: figures that /metrics shows besides the registry's.

    Raises:
        StartupError: the port is taken.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for collector in (RegistryCollector(service), CertificateCollector(), *more):
        registry.register(collector)
    metrics: WsgiApp = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/targets":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(targets(service.posted.workers)).encode()]
        return metrics(environ, start_response)

    try:
        server = MetricsHttpServer(host, port, app)
    except OSError as error:
        raise StartupError(
            f"control_plane.metrics_port: cannot listen on {host}:{port}: {error.strerror}; 0 takes a free port"
        ) from None
    try:
        yield server.url
    finally:
        server.close()


def targets(workers: Iterable[WorkerRecord]) -> list[dict[str, Any]]:
    """Where workers' /metrics are, as Prometheus' HTTP service discovery wants it."""
    found = []
    for record in workers:
        url = urlsplit(record.metrics_url)
        if not url.netloc:
            continue
        role, state, model = _kind(record)
        labels = {
            "__scheme__": url.scheme,
            "__metrics_path__": url.path,
            "__meta_slipstream_worker": record.worker_id,
            "__meta_slipstream_role": role,
            "__meta_slipstream_state": state,
            "__meta_slipstream_model": model,
        }
        found.append({"targets": [url.netloc], "labels": labels})
    return found


def _kind(record: WorkerRecord) -> tuple[str, str, str]:
    role = Role.Name(record.role).removeprefix("ROLE_").lower()
    return role, WorkerState.Name(record.state).removeprefix("WORKER_STATE_").lower(), record.model
