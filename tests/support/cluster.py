"""A real cluster for tests: `slipstream up` in a process of its own, on free ports, stopped with Ctrl-C.

Everything is found the way a user finds it: the ports in the run folder's `slipstream.yaml`, the workers in the
registry, their counters on their /metrics.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from slipstream.security import identity
from slipstream.security.channels import open_blocking_channel, open_channel
from slipstream.security.names import ComponentRole
from slipstream.security_settings import SecuritySettings
from slipstream.v1 import registry_pb2, registry_pb2_grpc, worker_pb2, worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState
from tests.support import warm_processes

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
LEFT_TIMEOUT_S = 5.0

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], *, timeout_s: float, every_s: float = 0.05) -> T:
    """Poll until `probe` returns something true, and return that; fail by name when it never does."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)


async def eventually(what: str, probe: Callable[[], object], *, timeout_s: float, every_s: float = 0.2) -> None:
    """`wait_for` in a thread, so that a test's own load goes on meanwhile; tells how long it was."""
    began_s = time.monotonic()
    await asyncio.to_thread(wait_for, what, probe, timeout_s=timeout_s, every_s=every_s)
    print(f"{what}: {time.monotonic() - began_s:.1f} s")  # noqa: T201 - shown where the test fails


class Cluster:
    """`slipstream up` with these flags.

    Args:
        run_folder: of the logs; made by the cluster.
        warm: workers are forked from a process that has imported the engine's libraries: see `warm_launcher`.
        first: of warm workers and their engines: functions, `module:function`, that they call before anything else.
    """

    def __init__(
        self, model: Path | str, run_folder: Path, *flags: str, warm: bool = False, first: Sequence[str] = ()
    ) -> None:
        self.run_folder = run_folder
        self._warm, self._first = warm, first
        program = ("tests.support.warm_launcher", warm_processes.server_address()) if warm else ("slipstream",)
        self._argv = [sys.executable, "-m", *program, "up"]
        self._argv += ["--model", str(model), "--log-dir", str(run_folder)]
        self._argv += ["--http-port", "0", "--grpc-port", "0", "--control-plane-port", "0", *flags]
        self._output = run_folder.with_suffix(".out")
        self.process: subprocess.Popen[bytes] | None = None
        self._settings: dict[str, dict[str, object]] = {}

    def __enter__(self) -> Self:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        # Also what decode could as well compute alone is handed over: that is what is tested.
        environ["SLIPSTREAM_FRONTEND__HANDOFF"] = "always"
        environ[warm_processes.FIRST_VARIABLE] = ",".join(self._first)
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                self._argv, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
        try:
            wait_for("the cluster is up", self._is_up, timeout_s=START_TIMEOUT_S, every_s=0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _is_up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"`slipstream up` ended:\n{self.output()[-4000:]}")
        # Its last words when all is ready are how to stop it.
        return "curl" in self.output() and self._read_settings()

    def _read_settings(self) -> bool:
        file = self.run_folder / "slipstream.yaml"
        if file.exists():
            self._settings = yaml.safe_load(file.read_text())
        return bool(self._settings)

    def output(self) -> str:
        """What `slipstream up` has printed."""
        return self._output.read_text(errors="replace")

    def log(self, component: str) -> str:
        return (self.run_folder / f"{component}.log").read_text(errors="replace")

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self._settings['frontend']['http_port']}"

    @property
    def grpc_target(self) -> str:
        return f"127.0.0.1:{self._settings['frontend']['grpc_port']}"

    @property
    def control_plane(self) -> str:
        return str(self._settings["control_plane"]["address"])

    @property
    def scaler(self) -> str:
        """The address where its planner starts and ends workers."""
        return str(self._settings["planner"]["scaler"])

    @property
    def control_plane_metrics(self) -> str:
        """The URL of the control plane's /metrics."""
        return f"http://127.0.0.1:{self._settings['control_plane']['metrics_port']}/metrics"

    def channel(self, address: str, peer: ComponentRole) -> grpc.Channel:
        """To one of its components, as an operator's command opens it."""
        with self._identity(ComponentRole.OPERATOR):
            return open_blocking_channel(address, peer=peer)

    def frontends_channel(self, worker: WorkerRecord) -> grpc.aio.Channel:
        """To a worker, as a frontend opens it."""
        with self._identity(ComponentRole.FRONTEND):
            return open_channel(worker.address, peer=ComponentRole.WORKER)

    def _identity(self, role: ComponentRole) -> AbstractContextManager[object]:
        security = SecuritySettings.model_validate(self._settings.get("security", {}))
        return identity.installed(security, role)

    def workers(self, *, settled: bool = False) -> list[WorkerRecord]:
        """The registry's view now.

        Args:
            settled: none at all while a registry that was just started may not have heard of all of them.
        """
        with self.channel(self.control_plane, ComponentRole.CONTROL_PLANE) as channel:
            watch = registry_pb2_grpc.RegistryStub(channel).Watch(registry_pb2.WatchRequest(), timeout=10)
            found = next(iter(watch))
            watch.cancel()
            return list(found.workers) if found.settled or not settled else []

    def ready_roles(self) -> Counter[Role.ValueType]:
        """Ready workers of each role; none while the control plane is away, or does not know all yet."""
        try:
            return Counter(one.role for one in self.workers(settled=True) if one.state == WorkerState.READY)
        except grpc.RpcError:
            return Counter()

    def worker(self, role: Role.ValueType) -> WorkerRecord:
        """The one ready worker of a role; waits for it."""

        def find() -> WorkerRecord | None:
            ready = (w for w in self.workers() if w.role == role and w.state == WorkerState.READY)
            return next(ready, None)

        return wait_for(f"a ready worker of role {role}", find, timeout_s=START_TIMEOUT_S, every_s=0.2)

    def ask_worker(self, worker: WorkerRecord) -> WorkerRecord:
        """A worker's own record as it is now; the registry's is up to a second old."""
        with self.channel(worker.address, ComponentRole.WORKER) as channel:
            return worker_pb2_grpc.WorkerStub(channel).GetStatus(worker_pb2.GetStatusRequest(), timeout=5)

    def metrics(self, role: Role.ValueType) -> dict[str, float]:
        """A worker's /metrics now: sample name, with the values of labels other than role and worker, to value."""
        return scrape(self.worker(role).metrics_url)

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster, the engines too."""
        assert self.process is not None
        launcher = psutil.Process(self.process.pid)
        logs = self.run_folder.glob("*.log") if self._warm else ()
        forked = [process for log in logs for process in warm_processes.forked_into(log)]
        return [launcher, *launcher.children(recursive=True), *forked]

    def engine_of(self, worker: WorkerRecord) -> psutil.Process:
        """The process of a worker's engine: the one that listens where its transfer agent does."""
        port = int(self.ask_worker(worker).transfer.address.rpartition(":")[2])  # the registry may not know it yet
        for one in psutil.net_connections(kind="tcp"):
            if one.laddr and one.laddr.port == port and one.status == psutil.CONN_LISTEN and one.pid:
                return psutil.Process(one.pid)
        raise AssertionError(f"nobody listens on the transfer port of {worker.worker_id}, {port}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop like Ctrl-C does; returns the exit status. Nothing is left behind, whatever happened.

        Raises:
            AssertionError: something was, and had to be killed here.
        """
        assert self.process is not None
        family = self.processes() if self.process.poll() is None else []
        self.process.send_signal(number)
        try:
            status = self.process.wait(timeout=STOP_TIMEOUT_S)
            left = [one.pid for one in psutil.wait_procs(family, timeout=LEFT_TIMEOUT_S)[1]]
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
        assert not left, f"processes {left} outlived their launcher"
        return status


def scrape(url: str) -> dict[str, float]:
    """All samples of a /metrics page."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name not in ("role", "worker")]
            samples[":".join([sample.name, *labels])] = sample.value
    return samples


def status_of(url: str) -> int:
    """The HTTP status of a GET; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0
