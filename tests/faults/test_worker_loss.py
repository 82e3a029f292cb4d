"""Workers that die or freeze, before a request and in the middle of it.

What is promised: the right tokens, or a clear error within the deadlines; never a hang, never another prompt's
text. The launcher starts a dead worker again, so each test begins with a whole cluster.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.client import AsyncClient, Client, Completion
from slipstream.errors import SlipstreamError
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from tests.support import plain_engine
from tests.support.cluster import Cluster, wait_for
from tests.support.tiny_model import VOCAB_SIZE

MAX_TOKENS = 400
PROMPT_TOKENS = 600
# Longer than every deadline of the cluster's flags together: what takes longer is a hang.
NO_HANG_S = 30.0


def new_prompt(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.fixture(scope="module")
def right(tiny_model: Path) -> dict[int, list[int]]:
    """What a plain engine answers to the prompts of seeds 0 to 7."""
    prompts = [new_prompt(seed) for seed in range(8)]
    return dict(enumerate(plain_engine.greedy(tiny_model, prompts, max_tokens=MAX_TOKENS)))


def workers_of(cluster: Cluster, role: Role.ValueType) -> list[WorkerRecord]:
    return [worker for worker in cluster.workers() if worker.role == role]


@dataclass(frozen=True)
class Caught:
    """A decode worker found at work on a request, its engine frozen in the middle of it."""

    worker: WorkerRecord
    engine: psutil.Process

    def kill(self) -> None:
        os.kill(self.worker.pid, signal.SIGKILL)


class Decoders:
    """The decode workers before a request, to catch the one that works on it however fast it is."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._all = [Caught(worker, cluster.engine_of(worker)) for worker in workers_of(cluster, Role.ROLE_DECODE)]

    def catch(self) -> Caught:
        """Freeze every engine, look which one has the request, let the others go."""

        def find() -> Caught | None:
            for one in self._all:
                one.engine.suspend()
            found = next((one for one in self._all if self._cluster.ask_worker(one.worker).load.running > 0), None)
            for one in self._all:
                if one is not found:
                    one.engine.resume()
            return found

        return wait_for("a decode worker has the request", find, timeout_s=10, every_s=0.01)


@contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """Freeze processes while the block runs."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.resume()


async def ask(client: AsyncClient, seed: int) -> Completion:
    async with asyncio.timeout(NO_HANG_S):
        return await client.complete(new_prompt(seed), max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)


async def test_a_stream_goes_on_elsewhere_when_its_decode_worker_is_killed(
    cluster: Cluster, right: dict[int, list[int]]
) -> None:
    async with AsyncClient(cluster.grpc_target) as client, asyncio.timeout(NO_HANG_S):
        tokens: list[int] = []
        account = None
        decoders = Decoders(cluster)
        stream = client.generate(new_prompt(0), max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
        async for piece in stream:
            if not tokens:
                (await asyncio.to_thread(decoders.catch)).kill()
            tokens += piece.token_ids
            account = piece.account or account
    assert tokens == right[0]
    assert account is not None
    assert account.attempts == 2


async def test_a_killed_engine_process_is_a_lost_worker(cluster: Cluster, right: dict[int, list[int]]) -> None:
    async with AsyncClient(cluster.grpc_target) as client:
        decoders = Decoders(cluster)
        asking = asyncio.create_task(ask(client, 1))
        (await asyncio.to_thread(decoders.catch)).engine.kill()
        assert list((await asking).token_ids) == right[1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0, "frequency_penalty": 0.5, "min_tokens": 300},
    ],
    ids=["seed", "frequency"],
)
async def test_what_a_sampler_remembers_of_an_answer_is_not_lost_with_its_worker(
    cluster: Cluster, sampling: dict[str, Any]
) -> None:
    async with AsyncClient(cluster.grpc_target) as client, asyncio.timeout(2 * NO_HANG_S):
        asked: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True, **sampling}
        whole = await client.complete(new_prompt(2), **asked)
        decoders, tokens = Decoders(cluster), list[int]()
        async for piece in client.generate(new_prompt(2), **asked):
            if not tokens:
                (await asyncio.to_thread(decoders.catch)).kill()
            tokens += piece.token_ids
            account = piece.account
    assert tokens == list(whole.token_ids)
    assert account is not None
    assert account.migrations == 1


async def test_decode_computes_the_prompt_when_the_prefill_worker_is_killed_before(
    cluster: Cluster, right: dict[int, list[int]]
) -> None:
    (prefill,) = workers_of(cluster, Role.ROLE_PREFILL)
    os.kill(prefill.pid, signal.SIGKILL)
    async with AsyncClient(cluster.grpc_target) as client:
        answer = await ask(client, 3)
    assert list(answer.token_ids) == right[3]
    assert answer.account is not None
    assert answer.account.fallback != ""
    assert answer.account.decode_computed_tokens == PROMPT_TOKENS


async def test_decode_computes_the_prompt_when_the_prefill_worker_is_killed_while_computing_it(
    cluster: Cluster, right: dict[int, list[int]]
) -> None:
    (prefill,) = workers_of(cluster, Role.ROLE_PREFILL)
    engine = cluster.engine_of(prefill)
    async with AsyncClient(cluster.grpc_target) as client:
        with stopped(engine):  # so that the kill finds it at work
            asking = asyncio.create_task(ask(client, 4))
            await asyncio.sleep(0.3)
            os.kill(prefill.pid, signal.SIGKILL)
            answer = await asking
    assert list(answer.token_ids) == right[4]
    assert answer.account is not None
    assert answer.account.fallback != ""


async def test_a_frozen_prefill_worker_costs_its_deadline_and_no_more(
    cluster: Cluster, right: dict[int, list[int]]
) -> None:
    (prefill,) = workers_of(cluster, Role.ROLE_PREFILL)
    async with AsyncClient(cluster.grpc_target) as client:
        with stopped(psutil.Process(prefill.pid), cluster.engine_of(prefill)):
            answer = await ask(client, 5)
    assert list(answer.token_ids) == right[5]
    assert answer.account is not None
    assert answer.account.fallback != ""


async def test_a_frozen_decode_worker_is_left_for_another_one(cluster: Cluster, right: dict[int, list[int]]) -> None:
    async with AsyncClient(cluster.grpc_target) as client:
        decoders = Decoders(cluster)
        asking = asyncio.create_task(ask(client, 6))
        caught = await asyncio.to_thread(decoders.catch)
        with stopped(psutil.Process(caught.worker.pid), caught.engine):
            assert list((await asking).token_ids) == right[6]


async def test_with_no_decode_worker_left_every_request_has_its_error_soon_or_its_answer_once_one_is_back(
    cluster: Cluster, right: dict[int, list[int]]
) -> None:
    for worker in workers_of(cluster, Role.ROLE_DECODE):
        os.kill(worker.pid, signal.SIGKILL)
    began_s = time.monotonic()
    async with AsyncClient(cluster.grpc_target) as client:
        answers = await asyncio.gather(*(ask(client, seed) for seed in range(4)), return_exceptions=True)
    for seed, answer in enumerate(answers):
        if isinstance(answer, Completion):
            assert list(answer.token_ids) == right[seed]
        else:
            assert isinstance(answer, SlipstreamError), answer
            assert answer.http_status in (503, 504)
    assert time.monotonic() - began_s < NO_HANG_S


def test_whatever_was_lost_the_cluster_comes_back_whole_and_holds_nothing(
    cluster: Cluster, right: dict[int, list[int]]
) -> None:
    with Client(cluster.grpc_target) as client:
        for _ in range(2):
            answer = client.complete(new_prompt(7), max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
            assert list(answer.token_ids) == right[7]
    wait_for(
        "all blocks are free",
        lambda: all(worker.load.blocks_used == 0 for worker in cluster.workers()),
        timeout_s=5,
    )
