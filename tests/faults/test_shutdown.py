"""An orderly end: what is open is finished, and nothing is left behind, however the end comes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psutil

from slipstream.client import Client
from slipstream.v1.registry_pb2 import Role, WorkerState
from tests.support.cluster import Cluster, wait_for

SHM = "/dev/shm/slipstream-"


def leftovers(family: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new(cluster: Cluster) -> None:
    tokens: list[int] = []

    def generate() -> None:
        with Client(cluster.grpc_target) as client:
            for piece in client.generate("How many stars", max_tokens=1500, temperature=0, ignore_eos=True):
                tokens.extend(piece.token_ids)

    asking = threading.Thread(target=generate)
    asking.start()

    decoders = [worker for worker in cluster.workers() if worker.role == Role.ROLE_DECODE]

    def busy() -> int | None:
        running = (worker for worker in decoders if cluster.ask_worker(worker).load.running > 0)
        return next((worker.pid for worker in running), None)

    pid = wait_for("a decode worker has the request", busy, timeout_s=10, every_s=0.02)
    os.kill(pid, signal.SIGTERM)

    def draining() -> bool:
        return any(worker.pid == pid and worker.state == WorkerState.DRAINING for worker in cluster.workers())

    wait_for("the worker drains", draining, timeout_s=5, every_s=0.02)
    with Client(cluster.grpc_target) as client:
        answer = client.complete("Nobody knows", max_tokens=4, ignore_eos=True)
        assert answer.account is not None
        drained = next(worker.worker_id for worker in cluster.workers() if worker.pid == pid)
        assert answer.account.decode_worker != drained
    asking.join(timeout=60)
    assert len(tokens) == 1500


def test_an_end_that_was_asked_for_leaves_no_process_and_no_shared_memory(tiny_model: Path, tmp_path: Path) -> None:
    """By SIGTERM. All other clusters of these tests end by Ctrl-C, and `Cluster.stop` looks what is left."""
    with Cluster(tiny_model, tmp_path / "run", "--dtype", "float32", warm=True) as cluster:
        family = cluster.processes()
        assert len(family) >= 7  # launcher, control plane, frontend, two workers and their engines
        shared = {Path(mapped.path) for process in family for mapped in process.memory_maps() if SHM in mapped.path}
        assert len(shared) == 2  # one lease board a worker
        assert cluster.stop(signal.SIGTERM) == 0
        assert leftovers(family) == []
        assert not [path for path in shared if path.exists()]


def test_not_even_a_killed_launcher_leaves_anything(tiny_model: Path, tmp_path: Path) -> None:
    with Cluster(tiny_model, tmp_path / "run", "--dtype", "float32") as cluster:
        family = cluster.processes()
        assert cluster.process is not None
        cluster.process.kill()
        wait_for("every process has ended", lambda: leftovers(family) == [], timeout_s=15)
