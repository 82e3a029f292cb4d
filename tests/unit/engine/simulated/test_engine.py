"""The simulated engine behind the Engine protocol: two of them in one loop, over real connections."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.protocol import PromptComputed, TokensGenerated
from engine.simulated.engine import SimulatedEngine
from engine.simulated.tokens import Answer
from kv_transfer.board import Board, Counter, Outcome
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.permits import Permit
from slipstream.block_keys import extend, root_key
from slipstream.errors import ContextLengthError, EngineDeadError, InvalidRequestError
from slipstream.settings import Settings
from slipstream.v1.registry_pb2 import TransferEndpoint
from slipstream.v1.sampling_pb2 import FinishReason, SamplingParams
from slipstream.v1.worker_pb2 import Handoff
from slipstream.worker_settings import SimulatedSettings, TransferSettings
from tests.support.kv_stranger import token
from tests.unit.engine.simulated.profiles import PROFILE, profile

WORDS = list(range(100, 200))
PROMPT = list(range(1, 31))
DEADLINE_S = 10.0


@dataclass
class Worker:
    """An engine with its board, and what its service would do."""

    engine: SimulatedEngine
    board: Board
    leases: LeaseTable
    stack: AsyncExitStack
    peer: bytes = bytes(32)

    @property
    def key(self) -> bytes:
        transfer = self.engine.transfer()
        assert transfer is not None
        return transfer.public_key

    def permit(self, name: bytes) -> Permit:
        return Permit(name, token(name.hex()), self.peer)

    def handoff(self, name: bytes) -> Handoff:
        return Handoff(id=name, sender=self.engine.transfer(), worker_id="w", token=token(name.hex()))

    async def prefill(
        self, name: bytes, lease: Lease, prompt: list[int] = PROMPT, source: Handoff | None = None, cached: bool = False
    ) -> PromptComputed:
        lease.seen_by_engine = True
        return await self.engine.prefill(
            name.decode(),
            prompt,
            (lease.slot, lease.nonce),
            permit=self.permit(name),
            source=source,
            cached_only=cached,
        )

    async def decode(
        self, name: str = "d", prompt: list[int] = PROMPT, handoff: Handoff | None = None, tokens: int = 6
    ) -> tuple[list[int], TokensGenerated]:
        said: list[int] = []
        sampling = SamplingParams(max_tokens=tokens)
        async with asyncio.timeout(DEADLINE_S), aclosing(self.engine.decode(name, prompt, sampling, handoff)) as stream:
            async for last in stream:
                said += last.token_ids
        return said, last

    async def ended(self, lease: Lease) -> Outcome:
        async with asyncio.timeout(DEADLINE_S):
            while (outcome := self.leases.outcome(lease)) is None:  # noqa: ASYNC110 - a word in shared memory
                await asyncio.sleep(0.005)
            return outcome

    @property
    def used(self) -> int:
        return self.engine.load().blocks_used


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[tuple[Worker, Worker]]:
    async with AsyncExitStack() as stack:
        yield await meet(await worker(stack, tmp_path), await worker(stack, tmp_path))


async def meet(one: Worker, other: Worker) -> tuple[Worker, Worker]:
    """Both are registered, and hand over to each other."""
    for here, there in ((one, other), (other, one)):
        here.peer = there.key
        await here.engine.admit([one.key, other.key])
    return one, other


async def worker(stack: AsyncExitStack, folder: Path, speed: float = 0.0, lease_s: float = 5.0, **sizes: int) -> Worker:
    board = Board.create(folder, slots=16)
    stack.callback(board.close)
    settings = Settings(
        simulated=SimulatedSettings(speed=speed), transfer=TransferSettings(silence_s=0.5, timeout_s=2.0)
    )
    engine = SimulatedEngine(settings, profile(**sizes), words=WORDS, served_name="m", board=board)
    own = await stack.enter_async_context(AsyncExitStack())
    await own.enter_async_context(engine.serving())
    return Worker(engine, board, LeaseTable(board, lease_s=lease_s), own)


def answer(prompt: list[int], tokens: int) -> list[int]:
    words = Answer(array("I", prompt), 0, WORDS)
    return [words.next() for _ in range(tokens)]


async def test_it_says_what_follows_from_the_prompt(workers: tuple[Worker, Worker]) -> None:
    _, alone = workers
    said, last = await alone.decode()
    assert said == answer(PROMPT, 6)
    assert last.finish_reason == FinishReason.FINISH_REASON_LENGTH
    assert last.account is not None
    assert (last.account.decode_computed_tokens, last.account.kv_blocks_moved) == (30, 0)
    assert last.times is not None
    assert alone.used == 0


async def test_a_stop_token_ends_an_answer(workers: tuple[Worker, Worker]) -> None:
    _, alone = workers
    stop = answer(PROMPT, 6)[3]
    sampling = SamplingParams(max_tokens=6, stop_token_ids=[stop], min_tokens=2)
    said = [token async for part in alone.engine.decode("d", PROMPT, sampling, None) for token in part.token_ids]
    assert said == answer(PROMPT, 4)
    assert alone.used == 0


async def test_a_prompt_is_handed_over_and_its_lease_ends_taken(workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    lease = prefill.leases.open()
    async with asyncio.TaskGroup() as group:
        sent = group.create_task(prefill.prefill(b"h" * 16, lease))
        got = group.create_task(decode.decode(handoff=prefill.handoff(b"h" * 16)))
    said, last = got.result()
    assert said == answer(PROMPT, 6)
    assert sent.result().computed_tokens == 30
    assert last.account is not None
    assert (last.account.decode_computed_tokens, last.account.kv_blocks_moved) == (1, 8)
    assert (last.account.kv_bytes_moved, last.account.transport, last.account.fallback) == (8000, "simulated", "")
    assert await prefill.ended(lease) is Outcome.TAKEN
    assert (prefill.used, decode.used, prefill.engine.load().handoffs_held) == (0, 0, 0)


async def test_a_receiver_that_comes_first_waits_for_the_prompt(workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    getting = asyncio.create_task(decode.decode(handoff=prefill.handoff(b"h" * 16)))
    await asyncio.sleep(0.05)
    assert decode.used == 0
    await prefill.prefill(b"h" * 16, prefill.leases.open())
    _, last = await getting
    assert last.account is not None
    assert last.account.decode_computed_tokens == 1


async def test_a_transfer_takes_the_time_of_its_bytes(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        prefill = await worker(stack, tmp_path, transfer_bytes_per_s=40_000)
        decode = await worker(stack, tmp_path)
        await meet(prefill, decode)
        await prefill.prefill(b"h" * 16, prefill.leases.open())
        _, last = await decode.decode(handoff=prefill.handoff(b"h" * 16))
        assert last.account is not None
        assert last.account.transfer_s == pytest.approx(8 * 1000 / 40_000 + 0.001)


@pytest.mark.parametrize("how", ["nobody there", "restarted", "died", "another prompt", "silent"])
async def test_whatever_fails_the_prompt_is_computed_in_place(
    workers: tuple[Worker, Worker], tmp_path: Path, how: str
) -> None:
    prefill, decode = workers
    handoff, lease = prefill.handoff(b"h" * 16), prefill.leases.open()
    if how == "nobody there":
        handoff.sender.address = "127.0.0.1:1"
    elif how == "restarted":
        handoff.sender.epoch += 1
    silent = await asyncio.start_server(_never_answers, "127.0.0.1", 0)
    if how == "silent":
        handoff.sender.address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    getting = asyncio.create_task(decode.decode(handoff=handoff))
    await asyncio.sleep(0.05)
    if how == "died":
        await prefill.stack.aclose()
    elif how == "another prompt":
        await prefill.prefill(b"h" * 16, lease, prompt=[7] * 30)
    said, last = await getting
    silent.close()
    assert said == answer(PROMPT, 6)
    assert last.account is not None
    assert last.account.decode_computed_tokens == 30
    assert last.account.fallback.startswith("transfer_")
    assert decode.engine.load().fallbacks_total == 1
    assert decode.used == 0


async def _never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def test_a_lease_that_is_given_up_frees_the_blocks(workers: tuple[Worker, Worker]) -> None:
    prefill, _ = workers
    lease = prefill.leases.open()
    await prefill.prefill(b"h" * 16, lease)
    assert prefill.used == 8
    prefill.leases.close(lease)
    assert await prefill.ended(lease) is Outcome.RELEASED
    assert prefill.used == 0


async def test_a_lease_that_nobody_renews_expires(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        prefill = await worker(stack, tmp_path, lease_s=0.1)
        lease = prefill.leases.open()
        await prefill.prefill(b"h" * 16, lease)
        assert await prefill.ended(lease) is Outcome.EXPIRED
        assert prefill.used == 0
        assert prefill.board.counter(Counter.HANDOFFS_EXPIRED) == 1


async def test_a_prefill_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        prefill = await worker(stack, tmp_path, speed=0.01)
        lease = prefill.leases.open()
        computing = asyncio.create_task(prefill.prefill(b"h" * 16, lease))
        await asyncio.sleep(0.05)
        computing.cancel()
        await asyncio.gather(computing, return_exceptions=True)
        assert await prefill.ended(lease) is Outcome.ABORTED
        assert prefill.used == 0
        assert prefill.board.counter(Counter.HANDOFFS_OPENED) == 1
        assert prefill.board.counter(Counter.HANDOFFS_ABORTED) == 1


async def test_a_stream_that_is_closed_frees_its_blocks(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        decode = await worker(stack, tmp_path, speed=1.0)
        stream = decode.engine.decode("d", PROMPT, SamplingParams(), None)
        await anext(stream)
        assert decode.used > 0
        await stream.aclose()
        assert (decode.used, decode.engine.load().running) == (0, 0)


async def test_what_was_generated_goes_back_to_a_prefill_worker(workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    said, _ = await decode.decode(tokens=8)
    conversation = [*PROMPT, *said]  # 38 tokens: 9 blocks, and what was said last
    back, onward = decode.leases.open(), prefill.leases.open()
    async with asyncio.TaskGroup() as group:
        group.create_task(decode.prefill(b"b" * 16, back, prompt=conversation[:37], cached=True))
        computed = group.create_task(
            prefill.prefill(b"o" * 16, onward, prompt=conversation, source=decode.handoff(b"b" * 16))
        )
    assert computed.result().received_tokens == 36
    assert computed.result().computed_tokens == 2
    assert await decode.ended(back) is Outcome.TAKEN


async def test_what_is_not_cached_is_not_handed_over(workers: tuple[Worker, Worker]) -> None:
    _, decode = workers
    lease = decode.leases.open()
    asked = asyncio.create_task(decode.prefill(b"h" * 16, lease, cached=True))
    assert await decode.ended(lease) is Outcome.NOT_CACHED
    assert not asked.done()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert decode.used == 0


async def test_it_tells_what_it_caches(workers: tuple[Worker, Worker]) -> None:
    _, alone = workers
    await alone.decode()
    changes = alone.engine.cache_changes()
    assert changes is not None
    known = set((await anext(changes)).stored)
    assert known == set(extend(root_key("m", 4), [*PROMPT, *answer(PROMPT, 5)], 4))
    await alone.decode("e", prompt=[9] * 55, tokens=2)
    change = await anext(changes)
    assert known.issuperset(change.removed)
    assert len(known | set(change.stored)) - len(change.removed) == alone.engine._scheduler.pool.cached


async def test_a_way_is_measured_to_a_peer_that_answers(workers: tuple[Worker, Worker]) -> None:
    one, other = workers
    endpoint = other.engine.transfer()
    assert endpoint is not None
    path = await one.engine.probe_path("w", endpoint, "")
    assert (path.error, path.transport, path.bytes_per_s) == ("", "simulated", PROFILE.transfer_bytes_per_s)
    assert (await one.engine.probe_path("w", endpoint, "ucx")).error
    gone = TransferEndpoint(address="127.0.0.1:1", epoch=1, public_key=other.key)
    assert "no transfer agent" in (await one.engine.probe_path("w", gone, "")).error


async def test_what_cannot_be_served_is_refused(workers: tuple[Worker, Worker]) -> None:
    _, alone = workers
    with pytest.raises(ContextLengthError):
        await alone.decode(prompt=[1] * 60)
    for sampling in (SamplingParams(logprobs=1), SamplingParams(stop=["x"]), SamplingParams(max_tokens=0)):
        with pytest.raises(InvalidRequestError):
            await anext(alone.engine.decode("d", PROMPT, sampling, None))
    await alone.stack.aclose()
    with pytest.raises(EngineDeadError):
        await alone.decode()


async def test_many_at_a_time_all_get_their_own_answers(workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    prompts = [[number, *PROMPT[: number % 20]] for number in range(40)]

    async def one(number: int) -> None:
        name, lease = number.to_bytes(16, "big"), prefill.leases.open()
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(
                prefill.engine.prefill(
                    f"p{number}",
                    prompts[number],
                    (lease.slot, lease.nonce),
                    permit=prefill.permit(name),
                    source=None,
                    cached_only=False,
                )
            )
            said, _ = await decode.decode(str(number), prompts[number], prefill.handoff(name))
            await sending
        assert said == answer(prompts[number], 6)
        prefill.leases.close(lease)
        await prefill.ended(lease)

    for start in range(0, 40, 10):
        await asyncio.gather(*(one(number) for number in range(start, start + 10)))
    assert (prefill.used, decode.used) == (0, 0)
