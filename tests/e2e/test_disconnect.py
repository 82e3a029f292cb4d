"""A client that goes away takes its work with it: both workers abort, and their blocks are free again."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from slipstream.client import AsyncClient, Client
from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import Cluster, wait_for
from tests.support.tiny_model import VOCAB_SIZE

FREE_WITHIN_S = 1.0


def blocks_used(cluster: Cluster) -> float:
    return sum(
        cluster.metrics(role)["slipstream_worker_kv_blocks_used"] for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE)
    )


def prompt_of(length: int) -> list[int]:
    return [random.randrange(3, VOCAB_SIZE) for _ in range(length)]


def check_all_free(cluster: Cluster) -> None:
    wait_for("all blocks are free", lambda: blocks_used(cluster) == 0, timeout_s=FREE_WITHIN_S, every_s=0.02)
    for role in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
        assert cluster.metrics(role)["slipstream_kv_handoffs_held"] == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_over_http_while_tokens_are_generated(cluster: Cluster, stream: bool) -> None:
    body = {
        "model": "tiny",
        "prompt": prompt_of(1000),
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": stream,
    }
    async with httpx.AsyncClient(timeout=60) as client:
        asking = asyncio.create_task(client.post(f"{cluster.http_url}/v1/completions", json=body))
        await asyncio.to_thread(
            wait_for, "decode works on it", lambda: blocks_used(cluster) >= 8, timeout_s=20, every_s=0.02
        )
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await asyncio.to_thread(check_all_free, cluster)


async def test_over_http_while_the_prompt_is_computed(cluster: Cluster) -> None:
    body = {"model": "tiny", "prompt": prompt_of(8000), "max_tokens": 8}
    async with httpx.AsyncClient(timeout=60) as client:
        for pause_s in (0.01, 0.05, 0.1, 0.15, 0.2):
            asking = asyncio.create_task(client.post(f"{cluster.http_url}/v1/completions", json=body))
            await asyncio.sleep(pause_s)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.to_thread(check_all_free, cluster)
            body["prompt"] = prompt_of(8000)


async def test_over_grpc_at_any_moment(cluster: Cluster) -> None:
    async with AsyncClient(cluster.grpc_target) as client:
        for taken in (0, 1, 5):
            stream = client.generate(prompt_of(2000), max_tokens=4000, ignore_eos=True)
            for _ in range(taken):
                await anext(stream)
            await stream.aclose()
            await asyncio.to_thread(check_all_free, cluster)


async def test_many_at_once(cluster: Cluster) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"model": "tiny", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        asking = [
            asyncio.create_task(
                client.post(f"{cluster.http_url}/v1/completions", json={**body, "prompt": prompt_of(1500)})
            )
            for _ in range(12)
        ]
        await asyncio.sleep(0.7)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    await asyncio.to_thread(check_all_free, cluster)


def test_afterwards_the_cluster_answers_as_before(cluster: Cluster) -> None:
    with Client(cluster.grpc_target) as client:
        assert len(client.complete(prompt_of(300), max_tokens=5, ignore_eos=True).token_ids) == 5
