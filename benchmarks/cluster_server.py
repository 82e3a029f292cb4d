"""The cluster that is measured: `slipstream up` with one prefill and one decode worker, every prompt handed over."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import yaml

from benchmarks.server import Server, child_environ, running
from deploy import readiness
from deploy.plan import CONTROL_PLANE, FRONTEND
from deploy.processes import Component
from deploy.supervisor import State
from slipstream.errors import UnavailableError
from slipstream.v1 import registry_pb2
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.registry_pb2_grpc import RegistryStub

_WORKERS = ("prefill-0", "decode-0")
_START_TIMEOUT_S = 180.0
# Longer than the cluster's own drain, so that it ends by itself.
_STOP_TIMEOUT_S = 75.0
_POLL_S = 0.1
_ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the decode worker has, so that another engine can be given the same.

    Attributes:
        device: `cpu` or `cuda`.
        kv_cache_bytes: of this one worker.
    """

    device: str
    max_model_len: int
    block_tokens: int
    kv_cache_bytes: int


@asynccontextmanager
async def cluster(
    model: str, folder: Path, *options: str, workers: Sequence[str] = _WORKERS
) -> AsyncIterator[tuple[Server, WorkerFacts]]:
    """The cluster while the block runs; its logs go below `folder`.

    Args:
        options: more of `slipstream up`.
        workers: that these start.

    Raises:
        StartupError: it did not become ready.
    """
    began_s = time.monotonic()
    run_folder = folder / "cluster"
    ports = ("--http-port", "0", "--grpc-port", "0", "--control-plane-port", "0")
    where = ("--model", model, "--log-dir", str(run_folder), *ports)
    component = Component(
        name="the cluster",
        argv=(sys.executable, "-P", "-m", "slipstream", "up", *where, *options),
        environ=child_environ(os.environ) | {"SLIPSTREAM_FRONTEND__HANDOFF": "always"},
        log_path=folder / "cluster.log",
    )
    until_ready = _UntilReady(run_folder / "slipstream.yaml", workers)
    async with running(
        component, until_ready, start_timeout_s=_START_TIMEOUT_S, stop_timeout_s=_STOP_TIMEOUT_S
    ) as process:
        worker = await _decode_worker(until_ready.registry)
        server = Server(
            name="slipstream",
            url=f"http://127.0.0.1:{until_ready.http_port}",
            model=worker.model,
            pid=process.pid,
            has_account=True,
            start_s=time.monotonic() - began_s,
        )
        yield server, _facts(worker)


class _UntilReady:
    """Waits until the cluster has written its ports down, then until all of it is ready."""

    def __init__(self, settings_file: Path, workers: Sequence[str]) -> None:
        self._settings_file = settings_file
        self._workers = workers
        self.http_port = 0
        self.registry = ""

    async def __call__(self) -> None:
        while not (settings := self._settings()):  # noqa: ASYNC110 - a file, written by another process
            await asyncio.sleep(_POLL_S)
        self.http_port = settings["frontend"]["http_port"]
        self.registry = str(settings["control_plane"]["address"])
        await readiness.until_ready(
            registry=self.registry,
            frontend_url=f"http://127.0.0.1:{self.http_port}",
            enough=readiness.all_named(self._workers, _unseen),
            control_plane=CONTROL_PLANE,
            frontend=FRONTEND,
            report=_unseen,
        )

    def _settings(self) -> dict[str, dict[str, Any]] | None:
        if not self._settings_file.exists():
            return None
        read: dict[str, dict[str, Any]] | None = yaml.safe_load(self._settings_file.read_text())
        return read


def _unseen(name: str, state: State, detail: str = "") -> None:
    """A report that nobody reads."""


async def _decode_worker(registry: str) -> WorkerRecord:
    async with grpc.aio.insecure_channel(registry) as channel:
        watch = RegistryStub(channel).Watch(registry_pb2.WatchRequest(), timeout=_ASK_TIMEOUT_S)
        async for worker_set in watch:
            for worker in worker_set.workers:
                if worker.role == Role.ROLE_DECODE:
                    watch.cancel()
                    return worker
    raise UnavailableError("the registry ended its stream without naming a decode worker")


def _facts(worker: WorkerRecord) -> WorkerFacts:
    capacity = worker.capacity
    return WorkerFacts(
        device=worker.device,
        max_model_len=capacity.max_model_len,
        block_tokens=capacity.block_tokens,
        kv_cache_bytes=capacity.blocks * capacity.block_bytes,
    )
