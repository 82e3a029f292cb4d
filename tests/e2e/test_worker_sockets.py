"""What a running cluster listens on is what the docs name: nothing of the engine's is open to the network."""

from __future__ import annotations

import stat
from pathlib import Path

import psutil

from tests.support.cluster import Cluster


def listening(pids: set[int]) -> set[tuple[str, int]]:
    found = psutil.net_connections(kind="inet")
    return {(one.laddr.ip, one.laddr.port) for one in found if one.pid in pids and one.status == psutil.CONN_LISTEN}


def test_a_worker_and_its_engine_listen_on_the_ports_that_they_tell_and_no_others(cluster: Cluster) -> None:
    for worker in cluster.workers():
        service = psutil.Process(worker.pid)
        pids = {service.pid, *(child.pid for child in service.children(recursive=True))}
        assert len(pids) > 1, "the engine is a process of its own"

        metrics = worker.metrics_url.removeprefix("http://").removesuffix("/metrics")

        told = {worker.address, metrics, worker.transfer.address}

        assert {f"{host}:{port}" for host, port in listening(pids)} == told


def test_the_engines_own_sockets_are_files_that_only_this_user_reaches(cluster: Cluster) -> None:
    paths = set()
    for worker in cluster.workers():
        for process in (psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)):
            paths |= {one.laddr for one in process.net_connections(kind="unix") if str(one.laddr).startswith("/")}

    assert paths
    for path in map(Path, paths):
        private = [place for place in (path, *path.parents) if not _open_to_others(place)]
        assert private, f"{path} can be opened by others"


def _open_to_others(place: Path) -> bool:
    """Whether others may enter a folder, or write to a socket."""
    mode = place.stat().st_mode
    return bool(mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IWOTH))
