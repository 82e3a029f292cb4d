"""A real cluster to break: one prefill and two decode workers with the tiny model, and short deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from slipstream.v1.registry_pb2 import WorkerState
from tests.support.cluster import START_TIMEOUT_S, Cluster, wait_for

WORKERS = 3
FLAGS = (
    *("--dtype", "float32", "--served-model-name", "tiny", "--decode", str(WORKERS - 1)),
    *("--prefill-timeout-s", "4", "--first-token-timeout-s", "4", "--token-timeout-s", "4"),
    *("--control-plane-lease-s", "3", "--handoff", "always"),
)


@pytest.fixture(scope="session")
def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tiny_model, tmp_path_factory.mktemp("faults") / "run", *FLAGS, warm=True) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The cluster with all its workers ready: those that an earlier test broke have been started again."""

    def whole() -> bool:
        try:
            now = [running.ask_worker(worker) for worker in running.workers()]
        except grpc.RpcError:  # one is dead, and the registry does not know it yet
            return False
        return [worker.state for worker in now] == [WorkerState.READY] * WORKERS

    wait_for("all workers are ready again", whole, timeout_s=START_TIMEOUT_S, every_s=0.3)
    return running
