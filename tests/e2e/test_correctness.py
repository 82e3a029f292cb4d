"""Greedy answers of the cluster equal those of one plain vLLM engine, token for token."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from slipstream.client import AsyncClient, Completion
from slipstream.v1.registry_pb2 import Role
from tests.support import plain_engine
from tests.support.cluster import Cluster
from tests.support.tiny_model import MAX_MODEL_LEN, SPECIAL_TOKENS, VOCAB_SIZE

MAX_TOKENS = 16
AT_ONCE = 8
# Around every border of a KV block (128 tokens) up to 3,000, and in between.
LENGTHS = sorted(
    {1, 2, 3, 31, 32, 33, 64, 100, 500, 1000, 1500, 2000, 2500, 2999, 3000}
    | {128 * k + d for k in (1, 2, 3, 4, 8, 12, 16, 20) for d in (-1, 0, 1, 2)}
)
SHARED_PREFIX = 700


def make_prompts() -> list[list[int]]:
    """Prompts of every length, then families that share a prefix, then exact repeats."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(count)]

    prompts = [tokens(length) for length in LENGTHS]
    shared = tokens(SHARED_PREFIX)
    prompts += [shared + tokens(extra) for extra in (1, 60, 68, 69, 200, 1000)]
    prompts += [shared[:128], shared[:129], shared[:256], shared]
    prompts += [prompts[10], prompts[-1], prompts[LENGTHS.index(3000)]]
    return prompts


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[list[int]]:
    return plain_engine.greedy(tiny_model, PROMPTS, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


async def ask_all(cluster: Cluster, *, at_once: int, streamed: bool) -> list[Completion]:
    room = asyncio.Semaphore(at_once)
    async with AsyncClient(cluster.grpc_target) as client:

        async def ask(prompt: list[int]) -> Completion:
            async with room:
                options = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
                if not streamed:
                    return await client.complete(prompt, **options)  # type: ignore[arg-type]
                return await client.generate(prompt, **options).collect()  # type: ignore[arg-type]

        return await asyncio.gather(*(ask(prompt) for prompt in PROMPTS))


def test_there_are_enough_prompts_and_the_model_is_worth_asking(expected: list[list[int]]) -> None:
    assert len(PROMPTS) >= 60
    assert (min(map(len, PROMPTS)), max(map(len, PROMPTS))) == (1, 3000)
    assert len({tuple(answer) for answer in expected}) > 50
    assert max(LENGTHS) + MAX_TOKENS < MAX_MODEL_LEN


@pytest.mark.parametrize(("at_once", "streamed"), [(1, True), (AT_ONCE, True), (AT_ONCE, False)])
async def test_token_ids_equal_those_of_a_plain_engine(
    cluster: Cluster, expected: list[list[int]], at_once: int, streamed: bool
) -> None:
    answers = await ask_all(cluster, at_once=at_once, streamed=streamed)
    wrong = [
        (len(prompt), list(answer.token_ids), right)
        for prompt, answer, right in zip(PROMPTS, answers, expected, strict=True)
        if list(answer.token_ids) != right
    ]
    assert wrong == []


@pytest.mark.parametrize("streamed", [True, False])
async def test_text_over_http_equals_that_of_a_plain_engine(
    cluster: Cluster, expected: list[list[int]], tokenizer: Tokenizer, streamed: bool
) -> None:
    room = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", timeout=120) as client:

        async def ask(prompt: list[int]) -> str:
            async with room:
                if streamed:
                    pieces = await client.completions.create(
                        model="tiny",
                        prompt=prompt,
                        max_tokens=MAX_TOKENS,
                        temperature=0,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                    return "".join([piece.choices[0].text async for piece in pieces])
                answer = await client.completions.create(
                    model="tiny",
                    prompt=prompt,
                    max_tokens=MAX_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                return answer.choices[0].text

        texts = await asyncio.gather(*(ask(prompt) for prompt in PROMPTS))
    assert texts == [tokenizer.decode(right) for right in expected]


async def test_prompts_met_for_the_first_time_are_computed_once_and_moved_whole(cluster: Cluster) -> None:
    rng = random.Random(11)
    block_tokens = cluster.worker(Role.ROLE_DECODE).capacity.block_tokens
    block_bytes = cluster.worker(Role.ROLE_DECODE).capacity.block_bytes
    before = cluster.metrics(Role.ROLE_DECODE)
    lengths = [2, block_tokens, block_tokens + 1, block_tokens + 2, 1000, 3000]
    async with AsyncClient(cluster.grpc_target) as client:
        for length in lengths:
            prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
            account = (await client.complete(prompt, max_tokens=2, temperature=0)).account
            assert account is not None
            # The last prompt token is decode's own; the blocks of all others move.
            blocks = -(-(length - 1) // block_tokens)
            assert (account.prefill_computed_tokens, account.decode_computed_tokens) == (length, 1)
            assert (account.kv_blocks_moved, account.kv_bytes_moved) == (blocks, blocks * block_bytes)
            assert account.fallback == ""
    after = cluster.metrics(Role.ROLE_DECODE)

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("slipstream_worker_prompt_tokens_computed_total") == len(lengths)
    moved = sum(-(-(length - 1) // block_tokens) for length in lengths)
    assert grown("slipstream_kv_transfer_blocks_total") == moved
    assert grown("slipstream_kv_transfer_bytes_total") == moved * block_bytes


async def test_prefix_hits_are_used_on_both_sides_and_only_the_missing_suffix_moves(cluster: Cluster) -> None:
    rng = random.Random(13)
    block_tokens = cluster.worker(Role.ROLE_DECODE).capacity.block_tokens
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(4 * block_tokens)]
    async with AsyncClient(cluster.grpc_target) as client:
        await client.complete([*shared, 5], max_tokens=1, temperature=0)
        tail = [rng.randrange(3, VOCAB_SIZE) for _ in range(block_tokens + 10)]
        account = (await client.complete(shared + tail, max_tokens=1, temperature=0)).account
        assert account is not None
        assert (account.prefill_cached_tokens, account.decode_cached_tokens) == (4 * block_tokens, 4 * block_tokens)
        assert account.prefill_computed_tokens == len(tail)
        assert (account.kv_blocks_moved, account.decode_computed_tokens) == (2, 1)
        again = (await client.complete([*shared, 9], max_tokens=1, temperature=0)).account
        assert again is not None
        assert (again.kv_blocks_moved, again.decode_cached_tokens) == (0, 4 * block_tokens)
        assert again.decode_computed_tokens == 1


async def test_over_all_that_was_asked_decode_computed_at_most_one_prompt_token_a_request(cluster: Cluster) -> None:
    await ask_all(cluster, at_once=AT_ONCE, streamed=True)
    metrics = cluster.metrics(Role.ROLE_DECODE)
    assert metrics["slipstream_kv_transfers_total:failed"] == 0
    assert metrics["slipstream_worker_prompt_tokens_computed_total"] <= metrics["slipstream_worker_requests_total"]
    assert metrics["slipstream_kv_transfer_bytes_total"] == (
        metrics["slipstream_kv_transfer_blocks_total"] * metrics["slipstream_worker_kv_block_bytes"]
    )
