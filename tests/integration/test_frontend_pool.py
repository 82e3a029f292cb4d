"""Several frontend processes on one port: real processes, a real control plane, workers that take no time."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import psutil
import pytest

from benchmarks.instant_worker import worker
from planner.server import open_control_plane
from slipstream.free_ports import free_port
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.inference_pb2 import ListModelsRequest
from slipstream.v1.inference_pb2_grpc import InferenceStub
from tests.support.text_model_folder import write_model_folder

PROCESSES = 2
REQUESTS = 40


@dataclass(frozen=True, slots=True)
class Pool:
    url: str
    grpc: str
    parent: psutil.Process

    def members(self) -> list[psutil.Process]:
        return [child for child in self.parent.children() if "frontend.pool_member" in child.cmdline()]

    async def ask(self, requests: int, request_id: str = "") -> list[int]:
        """The statuses; each request over a connection of its own, so that the kernel spreads them."""
        headers = {"x-request-id": request_id} if request_id else {}
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "ignore_eos": True}

        async def one() -> int:
            async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False) as http:
                return (await http.post("/v1/completions", json=body, headers=headers)).status_code

        return await asyncio.gather(*(one() for _ in range(requests)))

    async def explained(self, request_id: str) -> set[tuple[str, ...]]:
        """The request ids of those that are told of, asked over several connections."""
        found = set()
        for _ in range(8):
            async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False) as http:
                answer = await http.get(f"/slipstream/v1/requests/{request_id}")
            assert answer.status_code in (200, 404)
            told = answer.json() if answer.status_code == 200 else {"admissions": [], "dispatches": []}
            admitted, dispatched = (
                sorted(one["request_id"] for one in told[kind]) for kind in told if kind != "unix_s"
            )
            assert admitted == dispatched
            found.add(tuple(dispatched))
        return found

    async def page(self) -> str:
        """/metrics of any of them."""
        async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False) as http:
            return (await http.get("/metrics")).text

    async def process_metrics(self) -> dict[str, float]:
        """Of the pool, by name, `process_` left out."""
        return {name: float(value) for name, value in re.findall(r"^process_(\w+) (\S+)$", await self.page(), re.M)}

    async def answered(self) -> set[float]:
        """What /metrics says of the requests answered, asked over several connections."""
        found = set()
        for _ in range(6):
            page = await self.page()
            sums = re.findall(r"^slipstream_frontend_requests_total\{.*completions.*\} (\S+)$", page, re.MULTILINE)
            found.add(sum(map(float, sums)))
        return found

    async def until_ready(self, processes: int = PROCESSES) -> None:
        async with asyncio.timeout(60), httpx.AsyncClient(base_url=self.url, trust_env=False) as http:
            while True:
                try:
                    listening = [one for one in self.members() if self._listens(one)]
                    if len(listening) == processes and (await http.get("/health/ready")).status_code == 200:
                        return
                except (httpx.HTTPError, psutil.NoSuchProcess):
                    pass
                await asyncio.sleep(0.1)

    def _listens(self, process: psutil.Process) -> bool:
        port = int(self.url.rpartition(":")[2])
        return any(one.laddr.port == port and one.status == "LISTEN" for one in process.net_connections("tcp"))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    folder = write_model_folder(tmp_path)
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(open_control_plane(ControlPlaneSettings(port=0)))
        await stack.enter_async_context(worker(plane.address, "tiny", "d0", 0.0))
        yield await stack.enter_async_context(running(folder, plane.address))


@asynccontextmanager
async def running(folder: Path, registry: str) -> AsyncIterator[Pool]:
    http_port, grpc_port = free_port(), free_port()
    flags = ["--model", str(folder), "--served-model-name", "tiny", "--control-plane", registry]
    flags += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--workers", str(PROCESSES)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "slipstream", "frontend", *flags)
    try:
        pool = Pool(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", psutil.Process(process.pid))
        await pool.until_ready()
        yield pool
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(40):
            await process.wait()


async def test_all_serve_and_count_as_one_and_one_that_dies_is_replaced(pool: Pool) -> None:
    assert await pool.ask(REQUESTS) == [200] * REQUESTS
    async with grpc.aio.insecure_channel(pool.grpc) as channel:
        models = await InferenceStub(channel).ListModels(ListModelsRequest(), timeout=10)
    assert [model.id for model in models.models] == ["tiny"]
    assert await pool.answered() == {REQUESTS}, "whichever process is asked"

    assert await pool.ask(8, "eightfold") == [200] * 8
    (found,) = await pool.explained("eightfold")
    assert len(set(found)) == 8, "whichever process decided, and whichever is asked"

    alive = [pool.parent, *pool.members()]
    assert len(alive) == 1 + PROCESSES
    used_s, memory_bytes = sum(map(cpu_s, alive)), sum(one.memory_info().rss for one in alive)
    told = await pool.process_metrics()
    assert used_s - 0.1 <= told["cpu_seconds_total"] <= sum(map(cpu_s, alive)) + 0.1, "of all members and the parent"
    assert told["resident_memory_bytes"] == pytest.approx(memory_bytes, rel=0.2)
    assert told["start_time_seconds"] == pytest.approx(pool.parent.create_time(), abs=1.0)
    assert told["open_fds"] < told["max_fds"]

    before = pool.members()
    before[0].kill()
    psutil.wait_procs([before[0]], timeout=10)
    await pool.until_ready()
    assert before[1] in pool.members()
    assert await pool.ask(REQUESTS) == [200] * REQUESTS
    assert await pool.answered() == {2 * REQUESTS + 8}, "what the dead one has counted still counts"
    assert await pool.ask(1, "later") == [200]
    (found,) = await pool.explained("later")
    assert len(found) == 1, "what a dead one has left behind is in nobody's way"
    (new,) = set(pool.members()) - set(before)
    anew_s = cpu_s(new)
    later = await pool.process_metrics()
    assert later["cpu_seconds_total"] >= told["cpu_seconds_total"] + anew_s - 0.1, "what the dead one had used is in it"

    members = pool.members()
    folder = members[0].cmdline()[-1]
    assert os.path.isdir(folder)  # noqa: ASYNC240
    pool.parent.terminate()
    _gone, alive = await asyncio.to_thread(psutil.wait_procs, [pool.parent, *members], 30)
    assert not alive
    assert not os.path.exists(folder)  # noqa: ASYNC240


async def test_members_end_with_a_parent_that_was_killed(pool: Pool) -> None:
    members = pool.members()
    pool.parent.kill()
    _gone, alive = await asyncio.to_thread(psutil.wait_procs, members, 30)
    assert not alive
