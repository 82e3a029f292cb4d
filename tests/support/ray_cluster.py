"""A Ray cluster of several nodes on this machine: one head and raylets, each with its own processes, ended together.

Its nodes share the machine's address; everything else is as on several machines: each has its raylet, its agents and
its workers, and can be drained, or killed with all that runs on it. Ray's own files are in a short folder, because
the paths of its sockets have to be; only processes with this environment find and may join it.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import psutil

from tests.support.cluster import Cluster

OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes. Nothing of Slipstream's is ever in it."""
_GONE_TIMEOUT_S = 20.0


class RayCluster:
    """Started on entry; on exit none of its processes is left.

    Args:
        nodes: besides the head, which has no room for workers unless `head_cpus` are given.
        cpus: of each, as Ray counts them.

    Attributes:
        address: host:port of the head.
        environ: what a process needs to join it.
    """

    def __init__(self, nodes: int = 2, *, cpus: int = 4, head_cpus: int = 0) -> None:
        self._count = nodes
        self._cpus = cpus
        self._head_cpus = head_cpus
        self._stack = ExitStack()
        self._nodes: dict[str, Any] = {}
        self._cluster: Any = None
        self.address = ""
        self.environ: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        (folder / "ray").mkdir()
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environ = {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._stack.enter_context(mock.patch.dict(os.environ, self.environ))
        from ray.cluster_utils import Cluster as LocalRay  # late: it reads the environment

        family = {process.pid for process in psutil.Process().children(recursive=True)}
        self._stack.callback(self._end, family)
        head = {"num_cpus": self._head_cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        self._cluster = LocalRay(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self.address = self._cluster.address
        for _ in range(self._count):
            self.add_node()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def node_ids(self) -> list[str]:
        """Of those that run workers, and have not been killed."""
        return list(self._nodes)

    def add_node(self) -> str:
        """One node more; returns its id."""
        node = self._cluster.add_node(num_cpus=self._cpus, object_store_memory=OBJECT_STORE_BYTES)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def kill_node(self, node_id: str) -> None:
        """As a power cut does: all that runs there ends at once, without a word to anybody."""
        node = self._nodes.pop(node_id)
        pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
        family = [each for pid in pids for each in _family(pid)]
        for process in family:
            _kill(process)
        psutil.wait_procs(family, timeout=_GONE_TIMEOUT_S)
        self._cluster.worker_nodes.discard(node)

    def processes_of(self, node_id: str) -> list[psutil.Process]:
        """All that runs on a node."""
        infos = self._nodes[node_id].all_processes.values()
        return [each for some in infos for info in some for each in _family(info.process.pid)]

    def drain_node(self, node_id: str, *, deadline_s: float) -> None:
        """Announce that a node will go, as a cloud does before it takes one back. Ray ends it at the deadline."""
        import ray
        from ray.core.generated import autoscaler_pb2

        raylet: Any = ray._raylet
        reasons: Any = autoscaler_pb2
        accepted, why = raylet.GcsClient(address=self.address).drain_node(
            node_id,
            reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "a test",
            int((time.time() + deadline_s) * 1000),
        )
        assert accepted, why

    def _end(self, not_ours: set[int]) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
        for process in psutil.Process().children(recursive=True):
            if process.pid not in not_ours and "ray" in " ".join(_words(process)):
                _kill(process)
                psutil.wait_procs([process], timeout=_GONE_TIMEOUT_S)


class ClusterOnRay(Cluster):
    """`slipstream up --on ray` with these flags, on a Ray cluster of a test's."""

    def __init__(self, ray: RayCluster, model: Path | str, run_folder: Path, *flags: str) -> None:
        super().__init__(model, run_folder, "--on", "ray", "--address", ray.address, *flags)
        self.ray = ray

    def pids_on(self, node_id: str) -> set[int]:
        """Worker processes on a node, by their pids in the registry."""
        there = {process.pid for process in self.ray.processes_of(node_id)}
        return {record.pid for record in self.workers()} & there

    def spread(self) -> list[int]:
        """Workers on each node."""
        return [len(self.pids_on(node_id)) for node_id in self.ray.node_ids]


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
