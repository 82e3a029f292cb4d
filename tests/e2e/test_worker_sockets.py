"""What a running cluster listens on is what the docs name: nothing of the engine's is open to the network."""

from __future__ import annotations

import stat
from pathlib import Path

import psutil

from slipstream.v1.registry_pb2 import WorkerRecord
from tests.support.cluster import Cluster


def listening(*processes: psutil.Process) -> set[str]:
    """Of the TCP ports that these processes listen on: host:port."""
    found = [one for process in processes for one in process.net_connections(kind="inet")]
    mapped = "::ffff:"
    return {
        f"{one.laddr.ip.removeprefix(mapped)}:{one.laddr.port}" for one in found if one.status == psutil.CONN_LISTEN
    }


def engines(cluster: Cluster, worker: WorkerRecord) -> list[psutil.Process]:
    """All processes of a worker's engine."""
    engine = cluster.engine_of(worker)
    return [engine, *engine.children(recursive=True)]


def test_a_workers_service_listens_on_the_ports_that_it_tells_and_no_others(cluster: Cluster) -> None:
    for worker in cluster.workers():
        metrics = worker.metrics_url.removeprefix("http://").removesuffix("/metrics")

        assert listening(psutil.Process(worker.pid)) == {worker.address, metrics}


def test_the_engine_listens_for_transfers_alone_and_at_the_address_for_them(cluster: Cluster) -> None:
    """UCX and NIXL have ports of their own there; vLLM has none."""
    for worker in cluster.workers():
        ports = listening(*engines(cluster, worker))

        assert worker.transfer.address in ports
        assert {port.rpartition(":")[0] for port in ports} == {worker.transfer.address.rpartition(":")[0]}


def test_the_engines_own_sockets_are_files_that_only_this_user_reaches(cluster: Cluster) -> None:
    paths = set()
    for worker in cluster.workers():
        for process in (psutil.Process(worker.pid), *engines(cluster, worker)):
            paths |= {str(one.laddr) for one in process.net_connections(kind="unix") if str(one.laddr).startswith("/")}

    assert paths
    for path in map(Path, paths):
        private = [place for place in (path, *path.parents) if not _open_to_others(place)]
        assert private, f"{path} can be opened by others"


def _open_to_others(place: Path) -> bool:
    """Whether others may enter a folder, or write to a socket."""
    mode = place.stat().st_mode
    return bool(mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IWOTH))
