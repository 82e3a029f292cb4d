"""The clusters in which a node is killed: workers on a Ray cluster's nodes, or processes of this machine in threes."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import psutil
import yaml

from benchmarks.server import Server, child_environ, running
from deploy.processes import Component
from slipstream.errors import StartupError
from slipstream.v1 import registry_pb2
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState
from slipstream.v1.registry_pb2_grpc import RegistryStub

NODES = 3
LOCAL, RAY = "local", "ray"
_START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 90.0
_POLL_S = 0.1
_ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Failing:
    """A running cluster of which a third can be killed.

    Attributes:
        kill: ends one node with all that runs on it, at once, of those that have workers of both roles the one that
            has the most to do; takes the workers as they are now, and returns the ids of those that were there.
    """

    server: Server
    registry: str
    nodes: int
    kill: Callable[[Sequence[WorkerRecord]], Sequence[str]]

    async def workers(self) -> list[WorkerRecord]:
        """The registry's view now; none while it does not answer."""
        return await workers_of(self.registry)


@asynccontextmanager
async def cluster(on: str, folder: Path, each: int, profile: str) -> AsyncIterator[Failing]:
    """`each` prefill and as many decode workers a node, all of them ready, while the block runs.

    Raises:
        StartupError: it did not become ready.
    """
    async with AsyncExitStack() as stack:
        count = str(NODES * each)
        options = ["--engine", "simulated", "--prefill", count, "--decode", count]
        extra: Mapping[str, str] = {}
        ray: Any = None
        if on == RAY:
            from tests.support.ray_cluster import RayCluster  # late: Ray is not always installed

            ray = stack.enter_context(RayCluster(NODES, cpus=4 * each))
            options += ["--on", "ray", "--address", ray.address]
            extra = ray.environ
        environ = child_environ(os.environ) | dict(extra)
        environ |= {"SLIPSTREAM_FRONTEND__HANDOFF": "always", "SLIPSTREAM_WORKER__PROFILE": profile}
        server, registry = await stack.enter_async_context(_running(folder, environ, options, 2 * NODES * each))
        if ray is None:
            yield Failing(server, registry, NODES, lambda workers: _kill_processes(workers, each))
        else:
            yield Failing(server, registry, NODES, lambda workers: _kill_node(ray, workers))


async def workers_of(registry: str) -> list[WorkerRecord]:
    """Ready workers, as the registry knows them; none while it does not answer."""
    async with grpc.aio.insecure_channel(registry) as channel:
        watch = RegistryStub(channel).Watch(registry_pb2.WatchRequest(), timeout=_ASK_TIMEOUT_S)
        try:
            first = await watch.read()
        except grpc.aio.AioRpcError:
            return []
        watch.cancel()
    if not isinstance(first, registry_pb2.WorkerSet):
        return []
    return [one for one in first.workers if one.state == WorkerState.READY]


@asynccontextmanager
async def _running(
    folder: Path, environ: Mapping[str, str], options: Sequence[str], workers: int
) -> AsyncIterator[tuple[Server, str]]:
    began_s, run_folder = time.monotonic(), folder / "cluster"
    ports = ("--http-port", "0", "--grpc-port", "0", "--control-plane-port", "0")
    argv = (sys.executable, "-P", "-m", "slipstream", "up", "--log-dir", str(run_folder), *ports, *options)
    component = Component(name="the cluster", argv=argv, environ=dict(environ), log_path=folder / "cluster.log")
    written: dict[str, dict[str, Any]] = {}

    async def until_ready() -> None:
        file = run_folder / "slipstream.yaml"
        while not written:
            await asyncio.sleep(_POLL_S)
            if file.exists():
                written.update(yaml.safe_load(file.read_text()) or {})
        registry = str(written["control_plane"]["address"])
        while len(await workers_of(registry)) < workers:  # noqa: ASYNC110 - other processes
            await asyncio.sleep(_POLL_S)
        async with httpx.AsyncClient(trust_env=False) as client:
            while not await _is_ready(client, int(written["frontend"]["http_port"])):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)

    async with running(
        component, until_ready, start_timeout_s=_START_TIMEOUT_S, stop_timeout_s=_STOP_TIMEOUT_S
    ) as process:
        registry = str(written["control_plane"]["address"])
        model = (await workers_of(registry))[0].model
        url = f"http://127.0.0.1:{written['frontend']['http_port']}"
        yield Server("slipstream", url, model, process.pid, True, time.monotonic() - began_s), registry


async def _is_ready(client: httpx.AsyncClient, port: int) -> bool:
    try:
        return (await client.get(f"http://127.0.0.1:{port}/health/ready", timeout=_ASK_TIMEOUT_S)).status_code == 200
    except httpx.HTTPError:
        return False


def _kill_processes(workers: Sequence[WorkerRecord], each: int) -> list[str]:
    """As many workers of each role as a node has: those that have the most to do."""
    busiest = sorted(workers, key=lambda one: -one.load.running)
    victims = [
        one for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE) for one in [w for w in busiest if w.role == role][:each]
    ]
    for one in victims:
        psutil.Process(one.pid).kill()
    return [one.worker_id for one in victims]


def _kill_node(ray: Any, workers: Sequence[WorkerRecord]) -> list[str]:
    on_node: dict[str, list[WorkerRecord]] = {}
    for node_id in ray.node_ids:
        pids = {process.pid for process in ray.processes_of(node_id)}
        on_node[node_id] = [one for one in workers if one.pid in pids]

    def weight(node_id: str) -> tuple[int, int]:
        roles = {one.role for one in on_node[node_id]}
        return len(roles), sum(one.load.running for one in on_node[node_id])

    victim = max(on_node, key=weight)
    if not on_node[victim]:
        raise StartupError("no node of the Ray cluster has a worker")
    ray.kill_node(victim)
    return [one.worker_id for one in on_node[victim]]
