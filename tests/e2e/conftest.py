"""One real cluster for all end-to-end tests: one prefill and one decode worker with the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster") / "run"
    with Cluster(tiny_model, folder, "--dtype", "float32", "--served-model-name", "tiny") as running:
        yield running
