"""A real cluster on two hosts: control plane, frontend and decode worker on one, the prefill worker on the other.

Each part is the command that a user types. The functions below the class run in processes on one of the hosts, where
the addresses of the cluster mean something.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from slipstream.client import Account, Client
from slipstream.security import identity
from slipstream.security.authority import new_token, write_secret
from slipstream.security.channels import open_blocking_channel
from slipstream.security.names import ComponentRole
from slipstream.security_settings import SecuritySettings
from slipstream.v1 import registry_pb2, registry_pb2_grpc
from slipstream.v1.registry_pb2 import Role, WorkerState
from tests.support.cluster import START_TIMEOUT_S, STOP_TIMEOUT_S, scrape, wait_for
from tests.support.two_hosts import Host, TwoHosts

CONTROL_PORT, GRPC_PORT, HTTP_PORT = 7600, 8001, 8000
METRICS_PORT = 9100
# The longest prompt of the tests, with blocks to spare, but little memory.
_KV_CACHE_BYTES = 16 << 20
_ASK_TIMEOUT_S = 60.0

TOKEN_FILE = "cluster.token"
PREFILL, DECODE, FAR_DECODE, FOLLOWER = "prefill-far", "decode-near", "decode-far", "prefill-follower"
_SLIPSTREAM = (sys.executable, "-m", "slipstream")


@dataclass(frozen=True)
class Answer:
    """What a client gets, and what it cost."""

    tokens: list[int]
    account: Account


@dataclass(frozen=True)
class Worker:
    """What the registry has of a worker."""

    worker_id: str
    ready: bool
    host_id: str
    paths: list[str]


class TwoHostCluster:
    """Started on entry, killed on exit.

    Args:
        folder: for logs; made here.
        flags: of both workers.
        prefill_flags: of the prefill worker alone.
        frontend_flags: of the frontend.
        own_memory: whether the workers on the far host have PIDs and /dev/shm of their own.
        far_decode: whether there is a decode worker on the far host, too.
        group: whether the prefill worker is on both hosts: its first rank is near, the second far.
    """

    def __init__(
        self,
        hosts: TwoHosts,
        model: Path,
        folder: Path,
        *flags: str,
        prefill_flags: Sequence[str] = (),
        frontend_flags: Sequence[str] = (),
        own_memory: bool = False,
        far_decode: bool = False,
        group: bool = False,
    ) -> None:
        self.hosts = hosts
        self.folder = folder
        self.control_plane = f"{hosts.near.address}:{CONTROL_PORT}"
        self._model = model
        self._flags = flags
        self._prefill_flags = prefill_flags
        self._frontend_flags = frontend_flags
        self._own_memory = own_memory
        self._far_decode = far_decode
        self._group = group
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        write_secret(self.folder / TOKEN_FILE, f"{new_token()}\n")
        near, far = self.hosts.near, self.hosts.far
        join, model, worker = self._join, self._names, self._worker_flags
        ports = ("--http-port", str(HTTP_PORT), "--grpc-port", str(GRPC_PORT), "--security-anonymous")
        try:
            listens = ("--host", near.address, "--port", str(CONTROL_PORT), *self._token())
            self._start(near, "control-plane", "planner", "serve", *listens)
            self.start_prefill()
            if self._far_decode:
                words = ("decode-worker", "--worker-id", FAR_DECODE, "--host", far.address, *worker)
                other = ("--metrics-port", str(METRICS_PORT + 1))  # the last one of a flag counts
                self._start(far, FAR_DECODE, *words, *other, own_memory=self._own_memory)
            self._start(near, DECODE, "decode-worker", "--worker-id", DECODE, "--host", near.address, *worker)
            self._start(
                near, "frontend", "frontend", "--host", near.address, *ports, *model, *join, *self._frontend_flags
            )
            self.until_ready()
            self.ask([5], max_tokens=1)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, politely first."""
        family = [one for started in self._processes.values() for one in _family(started.pid)]
        for started in self._processes.values():
            with suppress(psutil.NoSuchProcess):
                _role(started.pid).terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for one in alive:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for started in self._processes.values():
            started.wait(STOP_TIMEOUT_S)
        self._processes.clear()

    def start_prefill(self) -> None:
        """Start the prefill worker; a group on both hosts, where it is one."""
        near, far = self.hosts.near, self.hosts.far
        words = ("prefill-worker", *self._worker_flags, *self._prefill_flags, "--worker-id", PREFILL)
        if not self._group:
            self._start(far, PREFILL, *words, "--host", far.address, own_memory=self._own_memory)
            return
        words += ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", near.address)
        other = ("--metrics-port", str(METRICS_PORT + 2))  # the last one of a flag counts
        self._start(near, PREFILL, *words, *other, "--host", near.address)
        self._start(far, FOLLOWER, *words, "--node-rank", "1", "--host", far.address, own_memory=self._own_memory)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("--model", str(self._model), "--served-model-name", "tiny")

    @property
    def _join(self) -> tuple[str, ...]:
        return ("--control-plane", self.control_plane, *self._token())

    @property
    def _worker_flags(self) -> tuple[str, ...]:
        own = ("--metrics-port", str(METRICS_PORT), "--threads", "1", "--kv-cache-bytes", str(_KV_CACHE_BYTES))
        return (*self._names, *self._join, "--dtype", "float32", *own, *self._flags)

    def kill(self, name: str) -> None:
        """End a part of the cluster as kill -9 does: the process alone, and not what it has started."""
        _role(self._processes[name].pid).kill()

    def family(self, name: str) -> list[psutil.Process]:
        """The processes of a part of the cluster."""
        return _family(self._processes[name].pid)

    def ended(self, name: str, timeout_s: float) -> int:
        """The exit status of a part of the cluster, once it has ended."""
        return self._processes.pop(name).wait(timeout_s)

    def until_ready(self) -> None:
        """Wait until all workers are ready and have met."""
        wait_for("both workers are ready and have met", self._is_ready, timeout_s=START_TIMEOUT_S, every_s=0.5)

    def _start(self, host: Host, name: str, *words: str, own_memory: bool = False) -> None:
        self._processes[name] = host.start((*_SLIPSTREAM, *words), self.folder / f"{name}.log", own_memory=own_memory)

    def _token(self) -> tuple[str, str]:
        return "--cluster-token-file", str(self.folder / TOKEN_FILE)

    def _is_ready(self) -> bool:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise AssertionError(f"{name} ended:\n{self.log(name)[-4000:]}")
        if "control_plane_listening" not in self.log("control-plane"):
            return False
        return (
            all(worker.ready and worker.paths for worker in self.workers())
            and len(self.workers()) == 2 + self._far_decode
        )

    def log(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def workers(self) -> list[Worker]:
        """The registry's view now."""
        return self.hosts.near.call(_workers, self.control_plane, self.folder / TOKEN_FILE)

    def metrics(self, name: str) -> dict[str, float]:
        """A worker's /metrics now."""
        host = self.hosts.near if name == DECODE else self.hosts.far
        port = METRICS_PORT + (name == FAR_DECODE)
        return host.call(scrape, f"http://{host.address}:{port}/metrics")

    def cpu_s(self, name: str) -> float:
        """CPU seconds that a part of the cluster has used so far."""
        times = [one.cpu_times() for one in _family(self._processes[name].pid)]
        return sum(each.user + each.system for each in times)

    def asking(self, prompt: Sequence[int], *, max_tokens: int = 8) -> Future[Answer]:
        """Ask, without waiting for the answer."""
        return self.hosts.near.submit(_ask, f"{self.hosts.near.address}:{GRPC_PORT}", list(prompt), max_tokens)

    def ask(self, prompt: Sequence[int], *, max_tokens: int = 8) -> Answer:
        """Ask, greedily."""
        return self.asking(prompt, max_tokens=max_tokens).result(timeout=_ASK_TIMEOUT_S)

    def slipstream(self, *words: str) -> str:
        """Run a command of the command line on the near host, as an operator would."""
        return self.hosts.near.run(*_SLIPSTREAM, *words, *self._join, timeout_s=90)

    def probe(self) -> list[dict[str, Any]]:
        """`slipstream transfer probe` between the two workers: one row for each direction."""
        rows: list[dict[str, Any]] = json.loads(self.slipstream("transfer", "probe", PREFILL, DECODE, "--json"))
        return rows


def _workers(control_plane: str, token_file: Path) -> list[Worker]:
    with (
        identity.installed(SecuritySettings(cluster_token_file=token_file), ComponentRole.OPERATOR),
        open_blocking_channel(control_plane, peer=ComponentRole.CONTROL_PLANE) as channel,
    ):
        watch = registry_pb2_grpc.RegistryStub(channel).Watch(registry_pb2.WatchRequest(), timeout=10)
        found = next(iter(watch))
        watch.cancel()
    return [
        Worker(
            record.worker_id,
            record.state == WorkerState.READY,
            record.host_id,
            [path.error or f"{path.transport}/{path.detail}" for path in record.paths],
        )
        for record in found.workers
        if record.role in (Role.ROLE_PREFILL, Role.ROLE_DECODE)
    ]


def _ask(target: str, prompt: list[int], max_tokens: int) -> Answer:
    with Client(target) as client:
        answer = client.complete(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    assert answer.account is not None
    return Answer(list(answer.token_ids), answer.account)


def _role(pid: int) -> psutil.Process:
    """The process that was asked for, behind the one that gives it PIDs of its own."""
    process = psutil.Process(pid)
    return process.children()[0] if process.name() == "unshare" and process.children() else process


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
