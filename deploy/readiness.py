"""When a cluster is ready: its workers are READY in the registry, and the frontend says that it can serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from urllib.parse import urlsplit

import grpc
import grpc.aio

from deploy.supervisor import Report
from slipstream.security.channels import open_channel
from slipstream.security.http_ends import probing_context
from slipstream.security.names import ComponentRole
from slipstream.v1 import registry_pb2
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.registry_pb2_grpc import RegistryStub

_RETRY_S = 0.25
_PROBE_TIMEOUT_S = 3.0


Enough = Callable[[Sequence[WorkerRecord]], bool]
"""Takes the registry's records, reports what it finds, and says whether these are all that is waited for."""


async def until_ready(
    *,
    registry: str,
    frontend_url: str,
    enough: Enough,
    control_plane: str,
    frontend: str,
    report: Report,
) -> None:
    """Wait, and report each change. Has no deadline of its own: the caller sets one.

    Args:
        registry: host:port of the control plane.
        frontend_url: of the HTTP face.
        enough: `all_named` or `counted`.
        control_plane, frontend: the names under which these two are reported.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(_until_registered(registry, enough, control_plane, report))
        group.create_task(_until_frontend_ready(frontend_url, frontend, report))


def all_named(workers: Collection[str], report: Report) -> Enough:
    """Wait for the workers with these names."""

    def enough(records: Sequence[WorkerRecord]) -> bool:
        named = [record for record in records if record.worker_id in workers]
        for record in named:
            report(record.worker_id, "ready" if _is_ready(record) else "loading")
        return {record.worker_id for record in named if _is_ready(record)} == set(workers)

    return enough


def counted(wanted: Mapping[Role.ValueType, int], pool: str, report: Report) -> Enough:
    """Wait for so many workers of each role; `pool` is the name under which what runs them is reported."""

    told: set[tuple[str, bool]] = set()

    def enough(records: Sequence[WorkerRecord]) -> bool:
        for record in records:
            news = (record.worker_id, _is_ready(record))
            if news not in told:
                told.add(news)
                report(record.worker_id, "ready" if _is_ready(record) else "loading")
        ready = Counter(record.role for record in records if _is_ready(record))
        whole = all(ready[role] >= count for role, count in wanted.items())
        if whole:
            report(pool, "ready")
        else:
            report(pool, "waiting for workers", f"{ready.total()} of {sum(wanted.values())} ready")
        return whole

    return enough


def _is_ready(record: WorkerRecord) -> bool:
    """A fenced worker was ready too: that it is sick is another matter, and no reason to wait for it."""
    return record.state in (registry_pb2.READY, registry_pb2.FENCED)


async def _until_registered(registry: str, enough: Enough, control_plane: str, report: Report) -> None:
    options = [("grpc.max_reconnect_backoff_ms", 500)]
    async with open_channel(registry, peer=ComponentRole.CONTROL_PLANE, options=options) as channel:
        while True:
            try:
                if await _watch(RegistryStub(channel).Watch, enough, control_plane, report):
                    return
            except grpc.RpcError:
                pass  # not listening yet
            await asyncio.sleep(_RETRY_S)


async def _watch(
    watch: grpc.aio.UnaryStreamMultiCallable[registry_pb2.WatchRequest, registry_pb2.WorkerSet],
    enough: Enough,
    control_plane: str,
    report: Report,
) -> bool:
    """True once all are ready; False when the registry ended the stream."""
    async for worker_set in watch(registry_pb2.WatchRequest()):
        report(control_plane, "ready")
        if enough(worker_set.workers):
            return True
    return False


async def _until_frontend_ready(url: str, frontend: str, report: Report) -> None:
    while (status := await _http_status(f"{url}/health/ready")) != 200:
        if status is not None:
            report(frontend, "waiting for workers")
        await asyncio.sleep(_RETRY_S)
    report(frontend, "ready")


async def _http_status(url: str) -> int | None:
    """The status of one GET, or None when nothing answers. A probe of ten lines, so that no HTTP client is needed."""
    parts = urlsplit(url)
    host, path = parts.hostname, parts.path
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            tls = probing_context() if parts.scheme == "https" else None
            reader, writer = await asyncio.open_connection(host, parts.port, ssl=tls)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
        return int(status_line.split()[1])
    except (OSError, EOFError, TimeoutError, IndexError, ValueError):
        return None
