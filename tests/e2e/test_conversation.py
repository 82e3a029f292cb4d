"""The second turn of a conversation: what decode generated is not computed again on prefill."""

from __future__ import annotations

import random
from pathlib import Path

from slipstream.client import Client, Completion
from slipstream.v1.registry_pb2 import Role
from tests.support import plain_engine
from tests.support.cluster import Cluster
from tests.support.tiny_model import SPECIAL_TOKENS, VOCAB_SIZE

BLOCK = 128
PROMPT_TOKENS, ANSWER_TOKENS, QUESTION_TOKENS, SECOND_ANSWER_TOKENS = 150, 400, 30, 16


def test_the_last_answer_comes_back_from_the_decode_worker(cluster: Cluster, tiny_model: Path) -> None:
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(count)]

    def ask(client: Client, prompt: list[int], max_tokens: int) -> Completion:
        return client.complete(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    received_before = cluster.metrics(Role.ROLE_PREFILL)["slipstream_worker_prompt_tokens_received_total"]
    with Client(cluster.grpc_target) as client:
        first = tokens(PROMPT_TOKENS)
        answer = ask(client, first, ANSWER_TOKENS)
        second = [*first, *answer.token_ids, *tokens(QUESTION_TOKENS)]
        last = ask(client, second, SECOND_ANSWER_TOKENS)
    received = cluster.metrics(Role.ROLE_PREFILL)["slipstream_worker_prompt_tokens_received_total"] - received_before
    # All whole blocks of the first turn but for its last token, of which prefill had the prompt's.
    known = (PROMPT_TOKENS + ANSWER_TOKENS - 1) // BLOCK * BLOCK
    cached = PROMPT_TOKENS // BLOCK * BLOCK
    assert received == known - cached
    assert last.account is not None
    assert last.account.fallback == ""
    assert last.account.prefill_cached_tokens == cached
    assert last.account.prefill_computed_tokens == len(second) - known
    assert [list(last.token_ids)] == plain_engine.greedy(tiny_model, [second], max_tokens=SECOND_ANSWER_TOKENS)
