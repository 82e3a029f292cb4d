"""A cluster whose engines have two tensor-parallel ranks each: the same tokens as one plain engine of one rank."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from slipstream.client import AsyncClient, Completion
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from tests.support import plain_engine
from tests.support.cluster import Cluster, eventually, wait_for
from tests.support.tiny_model import VOCAB_SIZE, make_tiny_model

MAX_TOKENS = 16
LENGTHS = (2, 128, 129, 300, 1000, 2500)
FLAGS = ("--dtype", "float32", "--served-model-name", "tiny", "--handoff", "always", "--tensor-parallel-size", "2")


def new_prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that two ranks can divide: two KV heads."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "two-heads", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def right(model: Path) -> dict[int, tuple[int, ...]]:
    """What a plain engine of one rank answers, by the prompt's length."""
    prompts = [new_prompt(length) for length in (*LENGTHS, 700)]
    answers = plain_engine.greedy(model, prompts, max_tokens=MAX_TOKENS)
    return {len(prompt): tuple(answer) for prompt, answer in zip(prompts, answers, strict=True)}


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(model, tmp_path_factory.mktemp("tensor-parallel") / "run", *FLAGS) as running:
        yield running


async def ask(cluster: Cluster, length: int) -> Completion:
    async with AsyncClient(cluster.grpc_target) as client:
        return await client.complete(new_prompt(length), max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)


def ranks_of(worker: WorkerRecord) -> list[psutil.Process]:
    """The processes of an engine's ranks, in order."""
    inside = psutil.Process(worker.pid).children(recursive=True)
    return sorted((one for one in inside if "Worker_TP" in " ".join(one.cmdline())), key=lambda one: one.cmdline())


def is_idle(cluster: Cluster, worker: WorkerRecord) -> bool:
    load = cluster.ask_worker(worker).load
    return (load.running, load.blocks_used, load.handoffs_held) == (0, 0, 0)


async def test_ranks_hand_their_parts_over_and_the_answers_are_those_of_one_rank(
    cluster: Cluster, right: dict[int, tuple[int, ...]]
) -> None:
    prefill, decode = cluster.worker(Role.ROLE_PREFILL), cluster.worker(Role.ROLE_DECODE)
    assert [len(worker.transfer.ranks) for worker in (prefill, decode)] == [2, 2]
    answers = await asyncio.gather(*(ask(cluster, length) for length in LENGTHS))
    for length, answer in zip(LENGTHS, answers, strict=True):
        assert answer.token_ids == right[length]
        assert answer.account is not None
        blocks = -(-(length - 1) // decode.capacity.block_tokens)
        assert (answer.account.prefill_computed_tokens, answer.account.decode_computed_tokens) == (length, 1)
        assert answer.account.kv_blocks_moved == blocks
        assert answer.account.kv_bytes_moved == blocks * decode.capacity.block_bytes
        assert (answer.account.transport, answer.account.fallback) == ("shm/direct", "")
    for worker in (prefill, decode):
        await eventually(f"{worker.worker_id} is idle", partial(is_idle, cluster, worker), timeout_s=10)


async def test_the_death_of_one_rank_ends_its_worker_and_the_other_one_computes_the_prompt(
    cluster: Cluster, right: dict[int, tuple[int, ...]]
) -> None:
    prefill, decode = cluster.worker(Role.ROLE_PREFILL), cluster.worker(Role.ROLE_DECODE)
    sending, receiving = ranks_of(prefill), ranks_of(decode)
    assert len(sending) == len(receiving) == 2
    receiving[1].suspend()  # so that the handoff cannot be over before the sender is lost
    try:
        asked = asyncio.create_task(ask(cluster, 700))
        await eventually("the prompt is computed", lambda: cluster.ask_worker(prefill).load.handoffs_held, timeout_s=30)
        sending[1].kill()
        await asyncio.to_thread(psutil.wait_procs, sending, timeout=20)
    finally:
        receiving[1].resume()
    answer = await asyncio.wait_for(asked, 60)
    assert answer.token_ids == right[700]
    assert answer.account is not None
    assert answer.account.fallback == "transfer_worker_gone"
    assert not any(one.is_running() for one in sending), "a rank outlives another one"
    await eventually("decode is idle", lambda: is_idle(cluster, decode), timeout_s=10)
    wait_for("the worker is gone", lambda: not psutil.pid_exists(prefill.pid), timeout_s=30)
