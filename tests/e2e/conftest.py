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


def tracing_flags(collector: Collector) -> list[str]:
    """Trace the requests that come with a `traceparent`, and no others."""
    return [
        *("--tracing-endpoint", collector.endpoint),
        *("--tracing-sample-ratio", "0"),
        *("--tracing-export-every-s", "0.1"),
    ]


@pytest.fixture(scope="session")
def real_cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster") / "run"
    # The model is so small that on a busy machine moving its blocks can look slower than computing them again.
    flags = ["--dtype", "float32", "--served-model-name", "tiny", "--handoff", "always", *tracing_flags(collector)]
    with Cluster(tiny_model, folder, *flags, warm=True) as running:
        yield running


@pytest.fixture(scope="session")
def cluster(real_cluster: Cluster) -> Cluster:
    return real_cluster
