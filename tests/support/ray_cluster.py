"""A Ray cluster of several nodes on this machine: one head and raylets, each with its own processes, ended together.

Its nodes share the machine's address; everything else is as on several machines: each has its raylet, its agents and
its workers, and can be drained, or killed with all that runs on it. Ray's own files are in a short folder, because
the paths of its sockets have to be; only processes with this environment find and may join it.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import psutil

from slipstream.v1.registry_pb2 import Role, WorkerState
from tests.support.cluster import Cluster, wait_for

_ANSWER_TIMEOUT_S = 90.0
_GONE_TIMEOUT_S = 30.0


class RayCluster:
    """Started on entry; on exit none of its processes is left.

    While it is entered, processes that are started here may join it.

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
        self._pids: dict[str, list[int]] = {}
        self._owner: subprocess.Popen[str] | None = None
        self._log = Path()
        self.address = ""
        self.environ: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(temporary))
            (folder / "ray").mkdir()
            self._log = folder / "nodes.log"
            token = folder / "token"
            token.write_text(secrets.token_hex(32))
            self.environ = {
                "RAY_TMPDIR": str(folder),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_USAGE_STATS_ENABLED": "0",
            }
            stack.enter_context(mock.patch.dict(os.environ, self.environ))
            stack.callback(self._end)
            command = (sys.executable, "-m", "tests.support.ray_nodes", str(self._head_cpus))
            with self._log.open("wb") as log:
                self._owner = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            self.address = self._answer()["address"]
            for _ in range(self._count):
                self.add_node()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def node_ids(self) -> list[str]:
        """Of those that run workers, and have not been killed."""
        return list(self._pids)

    def add_node(self) -> str:
        """One node more; returns its id."""
        answer = self._ask(f"add {self._cpus}")
        node_id: str = answer["node"]
        self._pids[node_id] = answer["pids"]
        return node_id

    def kill_node(self, node_id: str) -> None:
        """As a power cut does: all that runs there ends at once, without a word to anybody."""
        family = self.processes_of(node_id)
        del self._pids[node_id]
        for process in family:
            _kill(process)
        # What Ray has started itself stays a zombie until it looks after it.
        wait_for("the node is dead", lambda: not any(map(_runs, family)), timeout_s=_GONE_TIMEOUT_S)

    def processes_of(self, node_id: str) -> list[psutil.Process]:
        """All that runs on a node."""
        return [each for pid in self._pids[node_id] for each in _family(pid)]

    def drain_node(self, node_id: str, *, deadline_s: float) -> None:
        """Announce that a node will go, as a cloud does before it takes one back. Ray ends it at the deadline."""
        refused = self._ask(f"drain {node_id} {deadline_s}")["refused"]
        assert not refused, refused

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._owner is not None
        assert self._owner.stdin is not None
        self._owner.stdin.write(f"{command}\n")
        self._owner.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._owner is not None
        assert self._owner.stdout is not None
        # Each answer is one line, and is read whole before the next is asked for: nothing waits in the buffer.
        ready, _, _ = select.select([self._owner.stdout], [], [], _ANSWER_TIMEOUT_S)
        line = self._owner.stdout.readline() if ready else ""
        if not line:
            raise AssertionError(f"the nodes of the Ray cluster do not answer:\n{self._log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        """The owner ends its nodes; what is left after that, or of an owner that died, is killed."""
        if self._owner is None:
            return
        family = _family(self._owner.pid)
        with self._owner as owner:
            assert owner.stdin is not None
            owner.stdin.close()
            try:
                owner.wait(_GONE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                owner.kill()
        for process in family:
            _kill(process)
        wait_for("the Ray cluster has ended", lambda: not any(map(_runs, family)), timeout_s=_GONE_TIMEOUT_S)


class ClusterOnRay(Cluster):
    """`slipstream up --on ray` with these flags, on a Ray cluster of a test's."""

    def __init__(self, ray: RayCluster, model: Path | str, run_folder: Path, *flags: str) -> None:
        super().__init__(model, run_folder, "--on", "ray", "--address", ray.address, *flags)
        self.ray = ray

    def nodes_of(self, role: Role.ValueType | None = None) -> Counter[str]:
        """How many ready workers are on each node, of one role or of both."""
        ready = (one for one in self.workers() if one.state == WorkerState.READY)
        return Counter(one.node for one in ready if role in (None, one.role))

    def children(self, word: str) -> list[psutil.Process]:
        """Processes of the launcher whose command line has this word in it."""
        return [one for one in self.processes() if word in words_of(one)]


def words_of(process: psutil.Process) -> list[str]:
    """A process's command line; none of one that is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
