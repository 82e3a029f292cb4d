"""A cluster is ready when its workers and its frontend say so, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deploy.readiness import all_named, until_ready
from deploy.supervisor import State
from slipstream.v1.registry_pb2 import FENCED, ROLE_PREFILL, STARTING, WorkerSet
from tests.unit.slipstream.scripted_registry import record, serve

TIMEOUT_S = 30.0


class Reports:
    """Remembers the changes of each component."""

    def __init__(self) -> None:
        self.of: dict[str, list[State]] = {}

    def __call__(self, name: str, state: State, detail: str = "") -> None:
        states = self.of.setdefault(name, [])
        if states[-1:] != [state]:
            states.append(state)


@asynccontextmanager
async def frontend(statuses: list[str]) -> AsyncIterator[int]:
    """An HTTP server on loopback that answers with these status lines, the last one again and again."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        assert request.startswith(b"GET /health/ready HTTP/1.1\r\n")
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        writer.write(f"{status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def wait(registry: str, port: int, reports: Reports, workers: set[str]) -> None:
    await until_ready(
        registry=registry,
        frontend_url=f"http://127.0.0.1:{port}",
        enough=all_named(workers, reports),
        control_plane="control-plane",
        frontend="frontend",
        report=reports,
    )


async def test_every_step_is_reported_and_the_last_one_ends_the_wait() -> None:
    prefill, decode = record("prefill-0", ROLE_PREFILL), record("decode-0")
    sets = [
        WorkerSet(),
        WorkerSet(workers=[record("prefill-0", ROLE_PREFILL, STARTING), record("of-somebody-else")]),
        WorkerSet(workers=[prefill, record("decode-0", state=STARTING)]),
        WorkerSet(workers=[prefill, decode]),
    ]
    reports = Reports()
    with serve(sets) as registry:
        async with frontend(["HTTP/1.1 503 Service Unavailable", "HTTP/1.1 200 OK"]) as port:
            async with asyncio.timeout(TIMEOUT_S):
                await wait(registry, port, reports, {"prefill-0", "decode-0"})
    assert reports.of == {
        "control-plane": ["ready"],
        "prefill-0": ["loading", "ready"],
        "decode-0": ["loading", "ready"],
        "frontend": ["waiting for workers", "ready"],
    }


@pytest.mark.parametrize("status", ["HTTP/1.1 503 Service Unavailable", "nonsense", "HTTP/1.1 teapot"])
async def test_a_frontend_that_is_not_ready_keeps_it_waiting(status: str) -> None:
    reports = Reports()
    with serve([WorkerSet(workers=[record("decode-0")])]) as registry:
        async with frontend([status]) as port:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.6):
                    await wait(registry, port, reports, {"decode-0"})
    assert reports.of["decode-0"] == ["ready"]
    assert "ready" not in reports.of.get("frontend", [])


def test_a_worker_that_is_fenced_already_was_ready() -> None:
    assert all_named({"decode-0"}, Reports())([record("decode-0", state=FENCED)])
    assert not all_named({"decode-0"}, Reports())([record("decode-0", state=STARTING)])


async def test_a_control_plane_that_comes_late_is_found() -> None:
    reports = Reports()
    async with frontend(["HTTP/1.1 200 OK"]) as port:
        with serve([]) as address:
            pass  # this port is free again, and nothing listens on it
        waiting = asyncio.create_task(wait(address, port, reports, {"decode-0"}))
        while "frontend" not in reports.of:  # noqa: ASYNC110 - the frontend is found meanwhile
            await asyncio.sleep(0.01)
        assert "control-plane" not in reports.of
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
