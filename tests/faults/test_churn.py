"""Many requests at once, many of them abandoned at a random moment: what is answered is right, and nothing is kept.

The seed is fixed; the moments at which things happen are the machine's.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from slipstream.client import AsyncClient
from slipstream.errors import UnavailableError
from slipstream.v1.registry_pb2 import Role
from tests.support import plain_engine
from tests.support.cluster import Cluster, wait_for
from tests.support.tiny_model import VOCAB_SIZE

SEED = 20
REQUESTS = 300
AT_ONCE = 24
MAX_TOKENS = 40
ABANDONED_SHARE = 0.4


def make_prompts(rng: random.Random) -> list[list[int]]:
    """Families with shared prefixes, so that caches on both sides are in use while others are aborted."""
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((100, 128, 500, 1000)))] for _ in range(6)]
    return [rng.choice(stems) + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 900))] for _ in range(40)]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(random.Random(SEED))


@pytest.fixture(scope="module")
def right(tiny_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    return plain_engine.greedy(tiny_model, prompts, max_tokens=MAX_TOKENS)


async def churn(cluster: Cluster, prompts: list[list[int]], right: list[list[int]]) -> dict[str, int]:
    rng = random.Random(SEED)
    room = asyncio.Semaphore(AT_ONCE)
    seen = {"answered": 0, "abandoned": 0, "refused": 0}

    async def one(client: AsyncClient, which: int, patience_s: float | None) -> None:
        async with room:
            stream = client.generate(prompts[which], max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
            try:
                async with asyncio.timeout(patience_s):
                    answer = await stream.collect()
            except TimeoutError:
                seen["abandoned"] += 1
            except UnavailableError:
                seen["refused"] += 1
            else:
                seen["answered"] += 1
                assert list(answer.token_ids) == right[which]
            finally:
                await stream.aclose()

    async with AsyncClient(cluster.grpc_target) as client, asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            patience_s = rng.expovariate(4.0) if rng.random() < ABANDONED_SHARE else None
            group.create_task(one(client, rng.randrange(len(prompts)), patience_s))
    return seen


def open_files(cluster: Cluster) -> int:
    return sum(process.num_fds() for process in cluster.processes())


def nothing_kept(cluster: Cluster) -> bool:
    for worker in cluster.workers():
        load = cluster.ask_worker(worker).load
        if load.blocks_used or load.handoffs_held or load.running or load.waiting:
            return False
    return True


async def test_what_is_answered_is_right_and_what_is_abandoned_leaves_nothing(
    cluster: Cluster, prompts: list[list[int]], right: list[list[int]]
) -> None:
    await churn(cluster, prompts, right)  # the first round fills caches and pools
    wait_for("nothing is kept", lambda: nothing_kept(cluster), timeout_s=5)
    files_before = open_files(cluster)
    memory_before = [process.memory_info().rss for process in cluster.processes()]
    seen = await churn(cluster, prompts, right)
    assert sum(seen.values()) == REQUESTS
    assert seen["refused"] == 0
    assert seen["abandoned"] > 20
    assert seen["answered"] > REQUESTS // 3
    wait_for("nothing is kept", lambda: nothing_kept(cluster), timeout_s=5)
    assert open_files(cluster) <= files_before + 20  # connections come and go, but do not pile up
    grown = sum(process.memory_info().rss for process in cluster.processes()) - sum(memory_before)
    assert grown < 200 << 20
    prefill = cluster.metrics(Role.ROLE_PREFILL)
    ended = sum(value for name, value in prefill.items() if name.startswith("slipstream_kv_handoffs_total"))
    assert ended > 0
    assert prefill["slipstream_kv_handoffs_total:expired"] == 0
    assert prefill["slipstream_worker_requests_open"] == 0
