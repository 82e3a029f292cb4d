"""Workers change their roles under load, with real engines: no request fails, and no answer is another one."""

from __future__ import annotations

import asyncio
import random
import re
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest

from slipstream.client import AsyncClient, Client, Completion
from slipstream.v1 import worker_pb2, worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from tests.support.cluster import Cluster, scrape, wait_for
from tests.support.tiny_model import SPECIAL_TOKENS, VOCAB_SIZE

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE
NAMES = (("prefill", PREFILL), ("decode", DECODE))
BLOCK = 128
LENGTHS = (1, 40, 127, 128, 129, 300, 512, 700, 900)
AT_ONCE = 4
WAIT_S = 30.0


def make_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(length)]


async def ask(client: AsyncClient, prompt: list[int]) -> Completion:
    answer = client.generate(prompt, max_tokens=24, temperature=0.0, ignore_eos=True)
    return await answer.collect()


def give_role(worker: WorkerRecord, role: Role.ValueType) -> None:
    with grpc.insecure_channel(worker.address) as channel:
        record = worker_pb2_grpc.WorkerStub(channel).SetRole(
            worker_pb2.SetRoleRequest(role=role, epoch=worker.epoch), timeout=5
        )
    assert (record.worker_id, record.role, record.epoch) == (worker.worker_id, role, worker.epoch)


def failures(cluster: Cluster) -> float:
    """Calls to workers that failed, whatever became of the request."""
    seen = scrape(f"{cluster.http_url}/metrics")
    return sum(value for name, value in seen.items() if name.startswith("slipstream_frontend_worker_failures_total"))


def until_roles(cluster: Cluster, roles: dict[str, Role.ValueType]) -> None:
    """The registry says so, and the frontend has heard it."""

    def are() -> bool:
        with urllib.request.urlopen(f"{cluster.http_url}/metrics", timeout=10) as page:
            counted = re.findall(
                r'slipstream_frontend_workers\{role="(\w+)",state="ready"\} (\d+)', page.read().decode()
            )
        wanted = [(name, str(sum(role == one for role in roles.values()))) for name, one in NAMES]
        return {one.worker_id: one.role for one in cluster.workers()} == roles and sorted(counted) == sorted(wanted)

    wait_for(f"roles {roles}", are, timeout_s=WAIT_S)


@dataclass(slots=True)
class Load:
    """Requests that go on and on, each of which has one right answer."""

    prompts: list[list[int]]
    right: list[list[int]]
    answered: int = 0
    wrong: list[int] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def running(self, client: AsyncClient) -> AsyncIterator[None]:
        stop = asyncio.Event()

        async def go_on(number: int) -> None:
            while not stop.is_set():
                number = (number + 1) % len(self.prompts)
                answer = await ask(client, self.prompts[number])
                async with self._news:
                    self.answered += 1
                    self._news.notify_all()
                if list(answer.token_ids) != self.right[number]:
                    self.wrong.append(len(self.prompts[number]))

        async with asyncio.TaskGroup() as group:
            for start in range(AT_ONCE):
                group.create_task(go_on(2 * start))
            try:
                yield
            finally:
                stop.set()

    async def more(self, answers: int = 6) -> None:
        """Wait for so many more answers: requests that began before and after."""
        wanted = self.answered + answers
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: self.answered >= wanted)


async def test_roles_change_both_ways_under_load_and_every_answer_is_right(cluster: Cluster) -> None:
    rng = random.Random(23)
    prompts = [make_prompt(rng, length) for length in LENGTHS]
    first, second = cluster.worker(PREFILL), cluster.worker(DECODE)
    async with AsyncClient(cluster.grpc_target) as client:
        load = Load(prompts, [list((await ask(client, prompt)).token_ids) for prompt in prompts])
        failed = failures(cluster)
        try:
            async with load.running(client):
                await load.more()
                for roles in ((DECODE, DECODE), (DECODE, PREFILL), (DECODE, DECODE), (PREFILL, DECODE)):
                    for worker, role in zip((first, second), roles, strict=True):
                        await asyncio.to_thread(give_role, worker, role)
                    await asyncio.to_thread(
                        until_roles, cluster, dict(zip((first.worker_id, second.worker_id), roles, strict=True))
                    )
                    await load.more()
        finally:
            give_role(second, DECODE)
            give_role(first, PREFILL)
    until_roles(cluster, {first.worker_id: PREFILL, second.worker_id: DECODE})
    assert load.wrong == []
    assert failures(cluster) == failed, "requests that race with a change are served, not sent again"
    assert {one.worker_id: one.epoch for one in cluster.workers()} == {
        first.worker_id: first.epoch,
        second.worker_id: second.epoch,
    }, "nothing was restarted"


@pytest.mark.parametrize("length", [5 * BLOCK + 7])
def test_what_a_worker_has_cached_in_one_role_is_of_use_in_the_other(cluster: Cluster, length: int) -> None:
    prompt = make_prompt(random.Random(29), length)
    first, second = cluster.worker(PREFILL), cluster.worker(DECODE)
    with Client(cluster.grpc_target) as client:
        right = client.complete(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
        try:
            give_role(first, DECODE)
            give_role(second, PREFILL)
            until_roles(cluster, {first.worker_id: DECODE, second.worker_id: PREFILL})
            again = client.complete(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
        finally:
            give_role(second, DECODE)
            give_role(first, PREFILL)
            until_roles(cluster, {first.worker_id: PREFILL, second.worker_id: DECODE})
    assert again.token_ids == right.token_ids
    assert again.account is not None
    computed = max(again.account.prefill_computed_tokens, again.account.decode_computed_tokens)
    assert computed <= length - 5 * BLOCK
