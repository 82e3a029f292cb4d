"""The control plane is soft state: without it the cluster serves on, and with a new one nothing was lost."""

from __future__ import annotations

import psutil

from slipstream.client import Client
from slipstream.v1.registry_pb2 import WorkerState
from tests.faults.conftest import WORKERS
from tests.support.cluster import Cluster, wait_for


def control_plane_of(cluster: Cluster) -> psutil.Process:
    for process in cluster.processes():
        if "planner" in process.cmdline() and "serve" in process.cmdline():
            return process
    raise AssertionError("no control plane is running")


def ready_workers(cluster: Cluster) -> int:
    return sum(worker.state == WorkerState.READY for worker in cluster.workers())


def ask(cluster: Cluster) -> int:
    with Client(cluster.grpc_target) as client:
        return len(client.complete("How many stars", max_tokens=4, ignore_eos=True).token_ids)


def test_a_frozen_control_plane_is_not_missed(cluster: Cluster) -> None:
    control_plane = control_plane_of(cluster)
    control_plane.suspend()
    try:
        assert [ask(cluster) for _ in range(3)] == [4, 4, 4]
    finally:
        control_plane.resume()


def test_a_killed_control_plane_is_started_again_and_learns_every_worker(cluster: Cluster) -> None:
    before = {(worker.worker_id, worker.epoch) for worker in cluster.workers()}
    control_plane_of(cluster).kill()
    assert [ask(cluster) for _ in range(3)] == [4, 4, 4]

    def learnt() -> bool:
        try:
            return ready_workers(cluster) == WORKERS
        except Exception:  # it is not there yet
            return False

    wait_for("the new control plane knows the workers", learnt, timeout_s=30, every_s=0.2)
    assert {(worker.worker_id, worker.epoch) for worker in cluster.workers()} == before
    assert ask(cluster) == 4
