"""Write-backs: when one is planned (pure), and what one does to a request (scripted workers)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from frontend.router import Ask, Fleet
from frontend.router.speeds import COLD_SAMPLES, TYPICAL
from frontend.write_back import MIN_BLOCKS, WriteBack, plan
from slipstream.errors import UnavailableError
from slipstream.performance import PrefillPoint
from slipstream.v1.registry_pb2 import Capacity, Role, TransferEndpoint, TransferPath, WorkerRecord, WorkerState
from tests.support.scripted_cluster import PROMPT, ScriptedCluster, a_request, scripted_cluster, tokens_of
from tests.support.scripted_worker import BLOCK_TOKENS, Script, expected_answer, until
from tests.unit.frontend.dispatch.counting import Counting

BLOCK = 16
CAPACITY = Capacity(max_model_len=4096, block_tokens=BLOCK, blocks=100, block_bytes=1_000_000)


def record(worker_id: str, role: Role.ValueType, **fields: Any) -> WorkerRecord:
    endpoint = TransferEndpoint(address="h:1", epoch=7, transports=["shm", "ucx"])
    defaults: dict[str, Any] = {
        "state": WorkerState.READY,
        "model": "m",
        "host_id": "h",
        "capacity": CAPACITY,
        "transfer": endpoint,
    }
    return WorkerRecord(worker_id=worker_id, role=role, **{**defaults, **fields})


PREFILL = record("p", Role.ROLE_PREFILL)
DECODE = record("d", Role.ROLE_DECODE)


def ask(**known: int) -> Ask:
    return Ask("m", 400, known=known)


def planned(
    wanted: Ask, *decodes: WorkerRecord, tokens_per_s: float, prefill: WorkerRecord = PREFILL
) -> WriteBack | None:
    """The plan for a prefill worker of that speed among decode workers."""
    fleet = Fleet()
    fleet.apply([prefill, *decodes])
    points = tuple(PrefillPoint(tokens, tokens / tokens_per_s) for tokens in (1, 1000))
    fleet.note_profile("p", replace(TYPICAL, prefill=points))
    return plan(wanted, prefill, fleet)


def test_the_decode_worker_that_knows_most_of_the_prompt_hands_it_over() -> None:
    other = record("e", Role.ROLE_DECODE)
    found = planned(ask(d=160, e=320, p=32), DECODE, other, tokens_per_s=2000)
    assert found is not None
    assert (found.source.worker_id, found.tokens) == ("e", 320)


@pytest.mark.parametrize(("more_blocks", "moved"), [(MIN_BLOCKS, True), (MIN_BLOCKS - 1, False), (-1, False)])
def test_a_few_blocks_more_than_the_prefill_worker_has_are_computed(more_blocks: int, moved: bool) -> None:
    known = ask(d=160, p=160 - more_blocks * BLOCK)
    assert (planned(known, DECODE, tokens_per_s=100) is not None) == moved


# Ten blocks of 1 MB against 160 tokens.
@pytest.mark.parametrize(
    ("prefill", "tokens_per_s", "moved"),
    [
        ({}, 160 / 0.012, True),  # 11 ms by memory
        ({}, 160 / 0.010, False),
        ({"host_id": "elsewhere"}, 160 / 0.12, True),  # 110 ms by network
        ({"host_id": "elsewhere"}, 160 / 0.10, False),
        ({"paths": [TransferPath(peer_worker_id="d", peer_epoch=7, bytes_per_s=1e7, latency_s=0.5)]}, 160 / 1.6, True),
        ({"paths": [TransferPath(peer_worker_id="d", peer_epoch=7, bytes_per_s=1e7, latency_s=0.5)]}, 160 / 1.4, False),
    ],
    ids=["near-slow", "near-fast", "far-slow", "far-fast", "measured-slow", "measured-fast"],
)
def test_moving_must_be_cheaper_than_computing(prefill: dict[str, Any], tokens_per_s: float, moved: bool) -> None:
    worker = record("p", Role.ROLE_PREFILL, **prefill)
    assert (planned(ask(d=160), DECODE, tokens_per_s=tokens_per_s, prefill=worker) is not None) == moved


@pytest.mark.parametrize(
    "unfit",
    [
        {"state": WorkerState.DRAINING},
        {"model": "n"},
        {"transfer": TransferEndpoint()},
        {"role": Role.ROLE_PREFILL},
        {"capacity": Capacity(block_tokens=32)},
        {"host_id": "b", "transfer": TransferEndpoint(address="h:1", transports=["shm"])},
    ],
    ids=lambda unfit: next(iter(unfit)),
)
def test_a_worker_that_cannot_send_is_not_asked(unfit: dict[str, Any]) -> None:
    worker = WorkerRecord()
    worker.CopyFrom(DECODE)
    for name, value in unfit.items():
        if isinstance(value, Capacity | TransferEndpoint):
            getattr(worker, name).CopyFrom(value)
        else:
            setattr(worker, name, value)
    assert planned(ask(d=320), worker, tokens_per_s=100) is None
    assert planned(ask(d=320), DECODE, tokens_per_s=100) is not None


def test_neither_a_suspect_nor_a_worker_that_failed_the_request_is_asked() -> None:
    suspect = Ask("m", 400, suspects=frozenset({"d"}), known={"d": 320})
    assert planned(suspect, DECODE, tokens_per_s=100) is None
    failed = Ask("m", 400, excluded=frozenset({"d"}), known={"d": 320})
    assert planned(failed, DECODE, tokens_per_s=100) is None


async def first_turn(cluster: ScriptedCluster) -> list[int]:
    """A turn with an answer of four blocks; returns the next turn's prompt."""
    # A worker that takes a while: were it faster than any transfer, nothing would be moved.
    cluster.prefills[0].script = Script(delay_s=0.05)
    answer = tokens_of(await cluster.answer(a_request("turn-1", max_tokens=4 * BLOCK_TOKENS)))
    assert cluster.prefills[0].seen.prefills[0].HasField("source") is False
    return [*PROMPT, *answer, *range(2000, 2010)]


def write_backs() -> tuple[Counting, Counting, Counting]:
    return (
        Counting("slipstream_frontend_write_backs_total"),
        Counting("slipstream_frontend_write_back_tokens_total"),
        Counting("slipstream_frontend_write_backs_refused_total"),
    )


async def test_the_next_turn_fetches_the_last_answer_from_the_decode_worker_that_generated_it() -> None:
    started, tokens, refused = write_backs()
    async with scripted_cluster() as cluster:
        prompt = await first_turn(cluster)
        assert tokens_of(await cluster.answer(a_request("turn-2", token_ids=prompt))) == expected_answer(len(prompt), 8)
        (source,) = cluster.decodes[0].seen.prefills
        main = cluster.prefills[0].seen.prefills[1]
        # 40 + 64 tokens, of which the last has no KV: six whole blocks, and one token that is not taken from a cache.
        known = 6 * BLOCK_TOKENS
        assert source.cached_only
        assert list(source.token_ids) == prompt[: known + 1]
        assert (main.source.id, main.source.worker_id) == (source.handoff_id, "d0")
        assert main.source.sender == cluster.decodes[0].record.transfer
        assert len({source.handoff_id, main.handoff_id}) == 2
        assert (started.grown(), tokens.grown(), refused.grown()) == (1, known, 0)
        await cluster.until_idle()
        assert source.request_id in cluster.decodes[0].seen.cancelled, "it is let go of when the prompt is computed"


async def test_with_many_decode_workers_a_conversation_stays_where_it_is() -> None:
    async with scripted_cluster(decode=4) as cluster:
        prompt = await first_turn(cluster)
        # The next would be routed by measured speeds, and move by how busy this machine is.
        for turn in range(COLD_SAMPLES):
            prompt += tokens_of(await cluster.answer(a_request(f"turn-{turn + 2}", token_ids=prompt)))
        assert sorted(len(one.seen.decodes) for one in cluster.decodes) == [0, 0, 0, 1 + COLD_SAMPLES]


@pytest.mark.parametrize(
    "script",
    [Script(cached=False), Script(refuse=UnavailableError("busy", code="worker_busy"))],
    ids=["not_cached", "refused"],
)
async def test_a_write_back_of_which_nothing_comes_is_never_the_requests_failure(script: Script) -> None:
    started, tokens, refused = write_backs()
    failures = Counting("slipstream_frontend_worker_failures_total", role="decode", kind="refused")
    async with scripted_cluster(decode=2) as cluster:
        prompt = await first_turn(cluster)
        holder = next(one for one in cluster.decodes if one.seen.decodes)
        other = next(one for one in cluster.decodes if one is not holder)
        holder.prefill_script = script
        answers = [
            tokens_of(await cluster.answer(a_request(f"turn-2-{index}", token_ids=prompt))) for index in range(2)
        ]
        assert answers == [expected_answer(len(prompt), 8)] * 2
        assert (started.grown(), tokens.grown(), refused.grown()) == (1, 0, 1), "the worker is not asked again"
        assert (len(holder.seen.decodes), len(other.seen.decodes), failures.grown()) == (3, 0, 0)


async def test_a_source_that_hangs_is_let_go_of_when_the_client_goes() -> None:
    async with scripted_cluster() as cluster:
        prompt = await first_turn(cluster)
        cluster.decodes[0].prefill_script = Script(hang_at=0)
        stream = cluster.dispatcher.generate(a_request("turn-2", token_ids=prompt))
        task = asyncio.ensure_future(anext(stream))
        await until(lambda: cluster.decodes[0].seen.prefills)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cluster.until_idle()


async def test_write_backs_can_be_switched_off() -> None:
    started, _, _ = write_backs()
    async with scripted_cluster(write_back=False) as cluster:
        prompt = await first_turn(cluster)
        await cluster.answer(a_request("turn-2", token_ids=prompt))
        assert cluster.decodes[0].seen.prefills == []
        assert not cluster.prefills[0].seen.prefills[1].HasField("source")
    assert started.grown() == 0
