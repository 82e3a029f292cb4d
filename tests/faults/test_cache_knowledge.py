"""What a frontend knows of the workers' prefix caches, with real engines: where blocks are, and where no longer.

The test is a frontend itself, a second one: it follows the same feeds, and learns what it never asked for.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import psutil

from frontend.cache_watch import CacheWatch
from frontend.cluster_view import ClusterView, ClusterWatch
from frontend.known_caches import KnownCaches
from frontend.worker_channels import WorkerChannels
from slipstream.background import background
from slipstream.block_keys import extend, root_key
from slipstream.client import AsyncClient
from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import START_TIMEOUT_S, Cluster
from tests.support.tiny_model import VOCAB_SIZE

BLOCK = 128
PROMPT_TOKENS, ANSWER_TOKENS = 2 * BLOCK + 10, BLOCK


def new_tokens(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@asynccontextmanager
async def second_frontend(cluster: Cluster) -> AsyncIterator[KnownCaches]:
    caches = KnownCaches()
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(WorkerChannels())
        watch = await stack.enter_async_context(CacheWatch(caches, channels, frontend_id="second"))

        async def take(view: ClusterView) -> None:
            await watch.retain(view.records())

        workers = ClusterWatch(cluster.control_plane, clock=time.monotonic, on_change=take)
        await stack.enter_async_context(background(workers.follow(), name="workers"))
        yield caches


async def until(found: Callable[[], Mapping[str, int]], wanted: Mapping[str, int], timeout_s: float = 20.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while found() != wanted:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.05)
    except TimeoutError:
        assert found() == wanted


async def test_the_index_follows_blocks_from_their_computation_to_their_eviction(cluster: Cluster) -> None:
    async with second_frontend(cluster) as caches, AsyncClient(cluster.grpc_target) as client:
        prompt = new_tokens(1, PROMPT_TOKENS)
        answer = await client.complete(prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        assert answer.account is not None
        prefill, decode = answer.account.prefill_worker, answer.account.decode_worker
        assert prefill
        keys = extend(root_key("tiny", BLOCK), [*prompt, *answer.token_ids], BLOCK)
        whole = (PROMPT_TOKENS + ANSWER_TOKENS - 1) // BLOCK  # the last token was generated but not computed
        await until(lambda: caches.blocks(keys), {prefill: PROMPT_TOKENS // BLOCK, decode: whole})
        known = caches.get(decode)
        assert known is not None
        assert known.load is not None
        assert (known.own.running, known.own.waiting) == (0, 0), "it was the other frontend's request"

        capacity = next(one.capacity for one in cluster.workers() if one.worker_id == prefill)
        for seed in range(capacity.blocks * BLOCK // (capacity.max_model_len - BLOCK) + 1):
            await client.complete(new_tokens(100 + seed, capacity.max_model_len - BLOCK), max_tokens=1)
        await until(lambda: {name: count for name, count in caches.blocks(keys).items() if name == prefill}, {})


async def test_a_worker_that_was_killed_and_started_again_has_nothing(cluster: Cluster) -> None:
    async with second_frontend(cluster) as caches, AsyncClient(cluster.grpc_target) as client:
        prompt = new_tokens(2, PROMPT_TOKENS)
        answer = await client.complete(prompt, max_tokens=2, temperature=0.0, ignore_eos=True)
        assert answer.account is not None
        prefill, decode = answer.account.prefill_worker, answer.account.decode_worker
        keys = extend(root_key("tiny", BLOCK), prompt, BLOCK)
        await until(lambda: caches.blocks(keys), {prefill: 2, decode: 2})
        before = cluster.worker(Role.ROLE_PREFILL)
        for process in (psutil.Process(before.pid), cluster.engine_of(before)):
            os.kill(process.pid, signal.SIGKILL)
        await until(lambda: caches.blocks(keys), {decode: 2})

        def tells_again() -> dict[str, int]:
            known = caches.get(prefill)
            return {prefill: 1} if known and known.epoch > before.epoch and known.tells_blocks else {}

        await until(tells_again, {prefill: 1}, START_TIMEOUT_S)
        assert caches.blocks(keys) == {decode: 2}
