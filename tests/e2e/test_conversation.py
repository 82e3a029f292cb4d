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
CONVERSATIONS = 6


def test_the_last_answer_comes_back_from_the_decode_worker(cluster: Cluster, tiny_model: Path) -> None:
    # All whole blocks of the first turn but for its last token, of which prefill had the prompt's.
    known = (PROMPT_TOKENS + ANSWER_TOKENS - 1) // BLOCK * BLOCK
    cached = PROMPT_TOKENS // BLOCK * BLOCK
    with Client(cluster.grpc_target) as client:
        for seed in range(CONVERSATIONS):
            received_before = received_tokens(cluster)
            prompt, last = second_turn(client, random.Random(seed))
            assert last.account is not None
            assert last.account.fallback == ""
            assert last.account.prefill_cached_tokens == cached
            assert [list(last.token_ids)] == plain_engine.greedy(tiny_model, [prompt], max_tokens=SECOND_ANSWER_TOKENS)
            if received := received_tokens(cluster) - received_before:
                assert received == known - cached
                assert last.account.prefill_computed_tokens == len(prompt) - known
                return
            # Fetching is chosen where it was seen to be quicker than computing. With a model as small as this one a
            # machine that is busy with other things may have made it slower, for the moment.
            assert last.account.prefill_computed_tokens == len(prompt) - cached
    raise AssertionError(f"no answer of {CONVERSATIONS} conversations came back")


def second_turn(client: Client, rng: random.Random) -> tuple[list[int], Completion]:
    """A conversation of two turns: the second one's prompt and answer."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(count)]

    def ask(prompt: list[int], max_tokens: int) -> Completion:
        return client.complete(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    first = tokens(PROMPT_TOKENS)
    answer = ask(first, ANSWER_TOKENS)
    second = [*first, *answer.token_ids, *tokens(QUESTION_TOKENS)]
    return second, ask(second, SECOND_ANSWER_TOKENS)


def received_tokens(cluster: Cluster) -> float:
    return cluster.metrics(Role.ROLE_PREFILL)["slipstream_worker_prompt_tokens_received_total"]
