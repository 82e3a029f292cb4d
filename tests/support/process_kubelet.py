"""A kubelet for tests: the pods of the test's API server are real Slipstream workers, each a process of its own.

Each pod has an address of its own (127.1.0.N) and the ports of the chart. Readiness and liveness are asked for as the
chart's probes do, a pod that is deleted gets SIGTERM and its grace period, and one that ends by itself is started
again in the same pod.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from slipstream.addresses import host_port
from slipstream.background import background
from tests.support.kubernetes_controllers import Controllers
from tests.support.kubernetes_objects import Object, now

WORKER_PORT, METRICS_PORT = 7700, 9400
LIVE_SERVICE = "slipstream.v1.Worker"
PROBE_EVERY_S, PROBE_TIMEOUT_S = 0.25, 1.0
GRACE_S = 30.0
_SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(slots=True)
class Container:
    """The process of a pod."""

    pod: Object
    address: str
    process: subprocess.Popen[bytes]
    lived: bool = False
    failed_live: int = 0


@dataclass(slots=True)
class ProcessKubelet:
    """Runs the pods of these controllers while `running` is entered.

    Args:
        arguments: of every worker, besides its role.
        environ: of every worker, besides what the downward API gives it.

    Attributes:
        codes: exit codes of pods that were deleted.
        killed: pods that did not end within their grace period, or were not alive.
    """

    controllers: Controllers
    folder: Path
    arguments: tuple[str, ...]
    environ: Mapping[str, str]
    codes: dict[str, int] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    containers: dict[str, Container] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _ending: set[asyncio.Task[None]] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.controllers.started, self.controllers.deleted = self._start, self._delete
        try:
            async with background(self._probe(), name="kubelet"):
                yield
        finally:
            for one in self.containers.values():
                one.process.kill()
                one.process.wait()
            for task in self._ending:
                task.cancel()
            await asyncio.gather(*self._ending, return_exceptions=True)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        address = f"127.1.0.{next(self._numbers)}"
        pod["status"] |= {"podIP": address, "startTime": now()}
        self.containers[name] = Container(pod, address, self._run(pod, address))

    def _run(self, pod: Object, address: str) -> subprocess.Popen[bytes]:
        metadata = pod["metadata"]
        role = metadata["labels"]["slipstream.dev/role"]
        downward = {
            "SLIPSTREAM_WORKER__WORKER_ID": metadata["name"],
            "SLIPSTREAM_WORKER__HOST": address,
            "SLIPSTREAM_WORKER__PORT": str(WORKER_PORT),
            "SLIPSTREAM_WORKER__METRICS_PORT": str(METRICS_PORT),
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLIPSTREAM_")}
        command = [sys.executable, "-P", "-m", "slipstream", f"{role}-worker", *self.arguments]
        with (self.folder / f"{metadata['name']}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**inherited, **self.environ, **downward})

    def _delete(self, pod: Object) -> None:
        task = asyncio.get_running_loop().create_task(self._end(pod), name=f"end {pod['metadata']['name']}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        process = self.containers[name].process
        process.terminate()
        try:
            self.codes[name] = await asyncio.to_thread(process.wait, GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self.killed.append(name)
            self.codes[name] = await asyncio.to_thread(process.wait)
        del self.containers[name]
        self.controllers.gone(pod)

    async def _probe(self) -> None:
        while True:
            for one in list(self.containers.values()):
                await self._look_after(one)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _look_after(self, one: Container) -> None:
        if "deletionTimestamp" in one.pod["metadata"]:
            return  # as in Kubernetes: nobody asks any more whether it lives
        if one.process.poll() is not None:
            one.pod["status"].setdefault("containerStatuses", [{"name": "worker", "restartCount": 0}])
            one.pod["status"]["containerStatuses"][0]["restartCount"] += 1
            one.process, one.lived = self._run(one.pod, one.address), False
        live = await _check(one.address, LIVE_SERVICE)
        one.lived = one.lived or live
        one.failed_live = 0 if live or not one.lived else one.failed_live + 1
        if one.failed_live >= 3:
            self.killed.append(one.pod["metadata"]["name"])
            one.process.kill()
        self.controllers.set_ready(one.pod, live and await _check(one.address, ""))


async def _check(address: str, service: str) -> bool:
    """A gRPC probe."""
    async with grpc.aio.insecure_channel(host_port(address, WORKER_PORT)) as channel:
        with suppress(grpc.aio.AioRpcError):
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=PROBE_TIMEOUT_S
            )
            return bool(answer.status == _SERVING)
    return False
