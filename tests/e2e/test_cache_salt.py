"""Real engines: what one salt has cached is neither found nor offered under another one, and is found under its own."""

from __future__ import annotations

import random

import httpx
import pytest

from slipstream.v1.registry_pb2 import Role
from tests.support.cluster import Cluster
from tests.support.tiny_model import VOCAB_SIZE


@pytest.mark.parametrize("first", ["", "acme"])
async def test_a_prompt_is_cached_for_its_own_salt_alone(cluster: Cluster, first: str) -> None:
    block_tokens = cluster.worker(Role.ROLE_DECODE).capacity.block_tokens
    rng = random.Random(f"salted {first}")
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(3 * block_tokens + 5)]

    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60) as client:

        async def ask(salt: str) -> tuple[str, int]:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}
            answer = (await client.post("/v1/completions", json=body | ({"cache_salt": salt} if salt else {}))).json()
            return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        text, cold = await ask(first)
        same = await ask(first)
        others = [await ask(salt) for salt in ("", "acme", "other") if salt != first]

    assert cold == 0
    assert same == (text, 3 * block_tokens)
    assert others == [(text, 0), (text, 0)], "the same answer, computed anew"
