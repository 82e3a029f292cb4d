"""A cluster whose engines have two tensor-parallel ranks each: the same tokens as one plain engine of one rank.

A second decode worker has one rank only: it takes the two parts of each block together.
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from slipstream.client import AsyncClient, Completion
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from tests.support import plain_engine
from tests.support.cluster import START_TIMEOUT_S, Cluster, eventually, wait_for
from tests.support.tiny_model import VOCAB_SIZE, make_tiny_model

MAX_TOKENS = 16
LENGTHS = (2, 128, 129, 300, 1000, 2500)
WHOLE = "decode-whole"
FLAGS = ("--dtype", "float32", "--served-model-name", "tiny", "--tensor-parallel-size", "2")


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
    folder = tmp_path_factory.mktemp("tensor-parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    joins = [
        sys.executable,
        "-m",
        "slipstream",
        "decode-worker",
        "--model",
        str(model),
        *FLAGS[:4],
        "--worker-id",
        WHOLE,
    ]
    with (folder / f"{WHOLE}.log").open("wb") as log:
        whole = subprocess.Popen([*joins, "--control-plane", f"127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        with Cluster(model, folder / "run", *FLAGS, "--control-plane-port", port) as running:
            wait_for("all three are ready", lambda: running.ready_roles().total() == 3, timeout_s=START_TIMEOUT_S)
            yield running
    finally:
        whole.terminate()
        whole.wait(30)


async def ask(cluster: Cluster, length: int) -> Completion:
    async with AsyncClient(cluster.grpc_target) as client:
        return await client.complete(new_prompt(length), max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)


def ranks_of(worker: WorkerRecord) -> list[psutil.Process]:
    """The processes of an engine's ranks, in order."""
    inside = psutil.Process(worker.pid).children(recursive=True)
    return sorted((one for one in inside if "Worker_TP" in " ".join(one.cmdline())), key=lambda one: one.cmdline())


def engine_of(worker: WorkerRecord) -> psutil.Process:
    """The process that has the scheduler: it decides when blocks are asked for."""
    return max(psutil.Process(worker.pid).children(), key=lambda child: child.memory_info().rss)


def is_idle(cluster: Cluster, worker: WorkerRecord) -> bool:
    load = cluster.ask_worker(worker).load
    return (load.running, load.blocks_used, load.handoffs_held) == (0, 0, 0)


async def test_ranks_hand_their_parts_over_and_the_answers_are_those_of_one_rank(
    cluster: Cluster, right: dict[int, tuple[int, ...]]
) -> None:
    workers = cluster.workers()
    assert sorted(len(worker.transfer.ranks) for worker in workers) == [0, 2, 2]  # of one rank none is told
    assert len({worker.capacity.block_bytes for worker in workers}) == 1
    capacity = workers[0].capacity
    answers = await asyncio.gather(*(ask(cluster, length) for length in LENGTHS))
    for length, answer in zip(LENGTHS, answers, strict=True):
        assert answer.token_ids == right[length]
        assert answer.account is not None
        blocks = -(-(length - 1) // capacity.block_tokens)
        assert (answer.account.prefill_computed_tokens, answer.account.decode_computed_tokens) == (length, 1)
        assert answer.account.kv_blocks_moved == blocks
        assert answer.account.kv_bytes_moved == blocks * capacity.block_bytes
        assert (answer.account.transport, answer.account.fallback) == ("shm/direct", "")
    assert {answer.account.decode_worker for answer in answers if answer.account} == {"decode-0", WHOLE}
    for worker in workers:
        await eventually(f"{worker.worker_id} is idle", partial(is_idle, cluster, worker), timeout_s=10)


async def test_the_death_of_one_rank_ends_its_worker_and_the_other_one_computes_the_prompt(
    cluster: Cluster, right: dict[int, tuple[int, ...]]
) -> None:
    prefill = cluster.worker(Role.ROLE_PREFILL)
    decodes = [worker for worker in cluster.workers() if worker.role == Role.ROLE_DECODE]
    sending = ranks_of(prefill)
    assert len(sending) == 2
    receiving = [engine_of(worker) for worker in decodes]
    for engine in receiving:
        engine.suspend()  # so that the handoff cannot be over before the sender is lost
    try:
        asked = asyncio.create_task(ask(cluster, 700))
        await eventually("the prompt is computed", lambda: cluster.ask_worker(prefill).load.handoffs_held, timeout_s=30)
        sending[1].kill()
        await asyncio.to_thread(psutil.wait_procs, sending, timeout=20)
    finally:
        for engine in receiving:
            engine.resume()
    answer = await asyncio.wait_for(asked, 60)
    assert answer.token_ids == right[700]
    assert answer.account is not None
    assert answer.account.fallback == "transfer_worker_gone"
    assert not any(one.is_running() for one in sending), "a rank outlives another one"
    for worker in decodes:
        await eventually(f"{worker.worker_id} is idle", partial(is_idle, cluster, worker), timeout_s=10)
    wait_for("the worker is gone", lambda: not psutil.pid_exists(prefill.pid), timeout_s=30)
