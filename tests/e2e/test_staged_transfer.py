"""Where the kernel forbids one process to read another's memory, blocks go through shared memory instead."""

from __future__ import annotations

import random
from pathlib import Path

from slipstream.client import Client
from slipstream.v1.registry_pb2 import Role
from tests.support import plain_engine
from tests.support.cluster import Cluster
from tests.support.tiny_model import VOCAB_SIZE

FORBID = "tests.support.forbid_memory_reads:forbid"


def test_the_answers_are_the_same_and_the_slower_road_is_told(tiny_model: Path, tmp_path: Path) -> None:
    rng = random.Random(17)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (2, 128, 129, 130, 700, 3000)]
    prompts.append(prompts[-1][:1000] + prompts[-2])
    right = plain_engine.greedy(tiny_model, prompts, max_tokens=12)
    flags = ("--dtype", "float32", "--handoff", "always", "--transfer-mode", "auto")
    with Cluster(tiny_model, tmp_path / "run", *flags, warm=True, first=[FORBID]) as cluster:
        with Client(cluster.grpc_target) as client:
            answers = [client.complete(ids, max_tokens=12, temperature=0, ignore_eos=True) for ids in prompts]
        decode = cluster.metrics(Role.ROLE_DECODE)
    assert [list(answer.token_ids) for answer in answers] == right
    accounts = [answer.account for answer in answers if answer.account is not None]
    assert {account.transport for account in accounts} == {"shm/staged"}
    assert {account.decode_computed_tokens for account in accounts} == {1}
    assert (
        decode["slipstream_kv_transfer_bytes_by_path_total:shm/staged"] == decode["slipstream_kv_transfer_bytes_total"]
    )
    assert decode["slipstream_kv_transfers_total:done"] == len(prompts)
    assert decode["slipstream_kv_transfers_total:failed"] == 0
