"""One real cluster for all end-to-end tests: one prefill and one decode worker with the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.otlp_collector import Collector, collecting


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Cluster]:
    """It traces the requests that come with a `traceparent`, and no others."""
    folder = tmp_path_factory.mktemp("cluster") / "run"
    tracing = (
        "--tracing-endpoint",
        collector.endpoint,
        "--tracing-sample-ratio",
        "0",
        "--tracing-export-every-s",
        "0.1",
    )
    with Cluster(tiny_model, folder, "--dtype", "float32", "--served-model-name", "tiny", *tracing) as running:
        yield running
