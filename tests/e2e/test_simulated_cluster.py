"""A whole cluster of simulated workers, started as a user starts it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import psutil
import pytest

from slipstream.client import AsyncClient
from slipstream.performance import decode_profile
from slipstream.v1 import worker_pb2, worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import Cluster, scrape, wait_for
from tests.support.text_model_folder import write_model_folder

LONG = "hello world " * 40


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = write_model_folder(tmp_path_factory.mktemp("model"), config={"max_position_embeddings": 8192})
    folder = tmp_path_factory.mktemp("cluster") / "run"
    flags = ("--engine", "simulated", "--prefill", "2", "--decode", "2", "--served-model-name", "sim")
    # What a simulated worker computes in no time at all, a decode worker may well be chosen to compute alone.
    with Cluster(model, folder, *flags, "--handoff", "always", "--prefill-silence-s", "3") as running:
        yield running


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "sim", "prompt": prompt, "max_tokens": tokens, **more}


def test_no_worker_loads_torch_or_vllm(simulated: Cluster) -> None:
    workers = [process for process in simulated.processes() if "-worker" in " ".join(process.cmdline())]
    assert len(workers) == 4
    for worker in workers:
        assert not [one.path for one in worker.memory_maps() if "/torch/" in one.path or "/vllm/" in one.path]


async def test_prompts_are_handed_over_and_answers_come(simulated: Cluster) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        asked = [client.post(f"{simulated.http_url}/v1/completions", json=body(f"{n} {LONG}", 5)) for n in range(6)]
        answers = [answer.json() for answer in await asyncio.gather(*asked)]
    assert all(answer["usage"]["completion_tokens"] == 5 for answer in answers)
    assert len({answer["choices"][0]["text"] for answer in answers}) == 6
    decode = [record for record in simulated.workers() if record.role == Role.ROLE_DECODE]
    assert sum(simulated.ask_worker(record).load.fallbacks_total for record in decode) == 0


async def test_an_answer_goes_on_the_same_when_its_worker_dies(simulated: Cluster) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        url = f"{simulated.http_url}/v1/completions"
        whole = (await client.post(url, json=body(f"once {LONG}", 40))).json()["choices"][0]["text"]
        again = asyncio.create_task(client.post(url, json=body(f"once {LONG}", 40)))
        await asyncio.sleep(0.5)
        busy = await asyncio.to_thread(wait_for, "a decode worker is busy", lambda: _busy(simulated), timeout_s=20)
        psutil.Process(busy).kill()
        assert (await again).json()["choices"][0]["text"] == whole


async def test_prompts_leave_a_frozen_prefill_worker_for_the_other_one(simulated: Cluster) -> None:
    frozen, other = (one for one in simulated.workers() if one.role == Role.ROLE_PREFILL)
    process = psutil.Process(frozen.pid)
    async with AsyncClient(simulated.grpc_target) as client:
        process.suspend()
        try:
            asked = [client.complete(f"{n} frozen {LONG}", max_tokens=3) for n in range(6)]
            async with asyncio.timeout(30):
                answers = await asyncio.gather(*asked)
        finally:
            process.resume()
    accounts = [answer.account for answer in answers]
    assert {account.prefill_worker for account in accounts if account is not None} == {other.worker_id}
    assert {account.fallback for account in accounts if account is not None} == {""}
    assert max(account.attempts for account in accounts if account is not None) == 2
    # Not by the pings that it did not answer, which take fifteen seconds.
    assert scrape(f"{simulated.http_url}/metrics")["slipstream_migrations_total:silent:prefill"] > 0


def _busy(cluster: Cluster) -> int | None:
    for record in cluster.workers():
        if record.role == Role.ROLE_DECODE and record.load.running:
            return record.pid
    return None


def test_workers_tell_how_fast_they_are(simulated: Cluster) -> None:
    with grpc.insecure_channel(simulated.worker(Role.ROLE_PREFILL).address) as channel:
        watch = worker_pb2_grpc.WorkerStub(channel).WatchCache(worker_pb2.WatchCacheRequest(), timeout=10)
        update = next(iter(watch))
        watch.cancel()
    assert decode_profile(update.profile).name == "smollm2-cpu"
    assert update.blocks_known
