"""The prefill service: its leases and its events, with an engine that does what a test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.admission import Admission
from engine.protocol import PromptComputed
from kv_transfer.board import Board, Outcome, Word
from kv_transfer.leases import LeaseTable
from kv_transfer.permits import Permit
from prefill_worker.service import PrefillService
from slipstream.errors import InvalidRequestError, SlipstreamError, UnavailableError
from slipstream.v1 import worker_pb2
from slipstream.v1.registry_pb2 import TransferEndpoint
from slipstream.v1.worker_pb2 import Handoff, HandoffClosed, PrefillEvent, PrefillRequest
from tests.support.scripted_worker import until

ID, TOKEN = bytes(range(16)), bytes(range(32))
Script = Callable[[tuple[int, int]], Awaitable[PromptComputed]]


@dataclass(slots=True)
class ScriptedEngine:
    """Notes what it was asked and runs its script with the lease (slot, nonce)."""

    script: Script
    leases: list[tuple[int, int]] = field(default_factory=list)
    asked: list[tuple[bytes, Handoff | None, bool]] = field(default_factory=list)
    salts: list[str] = field(default_factory=list)
    aborted: int = 0

    async def prefill(
        self,
        request_id: str,
        token_ids: Sequence[int],
        lease: tuple[int, int],
        *,
        permit: Permit,
        source: Handoff | None,
        cached_only: bool,
        cache_salt: str = "",
    ) -> PromptComputed:
        self.salts.append(cache_salt)
        self.leases.append(lease)
        self.asked.append((permit.handoff, source, cached_only))
        try:
            return await self.script(lease)
        except asyncio.CancelledError:
            self.aborted += 1
            raise


def a_request(**changes: Any) -> PrefillRequest:
    return PrefillRequest(
        **{"token_ids": [1, 2], "handoff_id": ID, "handoff_token": TOKEN, "receiver_key": TOKEN, **changes}
    )


@dataclass(slots=True)
class Serving:
    board: Board
    engine: ScriptedEngine
    leases: LeaseTable
    service: PrefillService

    async def call(self, request: PrefillRequest) -> list[PrefillEvent]:
        async with asyncio.timeout(10), aclosing(self.service.prefill(request)) as events:
            return [event async for event in events]

    async def refused(self, request: PrefillRequest | None = None) -> str | None:
        """Call, see it end with an error, and return the field that is named."""
        with pytest.raises(SlipstreamError) as caught:
            await self.call(request or a_request())
        return caught.value.param

    def end_lease(self, outcome: Outcome) -> None:
        """What the engine writes when it ends the newest lease."""
        slot, nonce = self.engine.leases[-1]
        self.board.put(slot, Word.OUTCOME, nonce | outcome)


def serving(directory: Path, script: Script, *, lease_s: float = 30, slots: int = 1) -> Serving:
    board = Board.create(directory, slots=slots)
    engine, leases = ScriptedEngine(script), LeaseTable(board, lease_s=lease_s)
    service = PrefillService(
        engine,  # type: ignore[arg-type]
        leases,
        Admission(limit=4),
        model="tiny",
        lease_s=lease_s,
    )
    return Serving(board, engine, leases, service)


def fails(error: SlipstreamError) -> Script:
    async def script(lease: tuple[int, int]) -> PromptComputed:
        raise error

    return script


async def computes(lease: tuple[int, int]) -> PromptComputed:
    return PromptComputed(5, 3, 8)


async def never_returns(lease: tuple[int, int]) -> PromptComputed:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits a minute")


async def test_the_prompt_is_computed_then_the_lease_ends(tmp_path: Path) -> None:
    worker = serving(tmp_path, computes)
    source = Handoff(id=ID, worker_id="d", sender=TransferEndpoint(address="h:1", epoch=2))
    async with aclosing(worker.service.prefill(a_request(source=source))) as events:
        computed = await anext(events)
        assert computed.computed == worker_pb2.PromptComputed(computed_tokens=5, cached_tokens=3, received_tokens=8)
        assert worker.engine.asked == [(ID, source, False)]
        worker.end_lease(Outcome.TAKEN)
        assert (await anext(events)).closed.outcome == HandoffClosed.TAKEN
    assert worker.leases.open_count == 0


async def test_a_call_that_is_left_releases_its_blocks(tmp_path: Path) -> None:
    worker = serving(tmp_path, computes)
    async with aclosing(worker.service.prefill(a_request())) as events:
        await anext(events)
    slot, nonce = worker.engine.leases[0]
    assert worker.board.get(slot, Word.RELEASED) == nonce


@pytest.mark.parametrize("length", [0, 15, 17])
async def test_a_handoff_id_of_another_length_is_refused_before_the_engine_sees_it(tmp_path: Path, length: int) -> None:
    worker = serving(tmp_path, computes)
    assert await worker.refused(a_request(handoff_id=bytes(length))) == "handoff_id"
    assert worker.engine.leases == []
    assert worker.leases.open().slot == 0


@pytest.mark.parametrize(
    ("outcome", "closed"),
    [(Outcome.NOT_CACHED, HandoffClosed.NOT_CACHED), (Outcome.RELEASED, HandoffClosed.RELEASED)],
    ids=["not_cached", "released"],
)
async def test_a_prompt_that_is_not_cached_is_not_waited_for(tmp_path: Path, outcome: Outcome, closed: int) -> None:
    worker = serving(tmp_path, never_returns)

    async def look_into_the_cache(lease: tuple[int, int]) -> PromptComputed:
        worker.end_lease(outcome)
        return await never_returns(lease)

    worker.engine.script = look_into_the_cache
    (event,) = await worker.call(a_request(cached_only=True))
    assert event.closed.outcome == closed
    assert worker.engine.aborted == 1
    assert worker.leases.open().slot == 0, "the lease has ended on both sides"


async def test_a_cached_prompt_is_handed_over_by_a_decode_worker(tmp_path: Path) -> None:
    worker = serving(tmp_path, computes)

    async def hand_over(lease: tuple[int, int]) -> PromptComputed:
        worker.end_lease(Outcome.TAKEN)
        return PromptComputed(1, 8, 0)

    worker.engine.script = hand_over
    computed, closed = await worker.call(a_request(cached_only=True))
    assert (computed.computed.cached_tokens, closed.closed.outcome) == (8, HandoffClosed.TAKEN)


async def test_the_lease_is_renewed_while_the_prompt_is_computed(tmp_path: Path) -> None:
    worker = serving(tmp_path, computes, lease_s=0.1)

    async def compute_until_renewed_twice(lease: tuple[int, int]) -> PromptComputed:
        seen = set[int]()
        while len(seen) < 3:
            seen.add(worker.board.get(lease[0], Word.DEADLINE))
            await asyncio.sleep(0.01)
        worker.end_lease(Outcome.TAKEN)
        return PromptComputed(2, 0, 0)

    worker.engine.script = compute_until_renewed_twice
    assert len(await worker.call(a_request())) == 2


async def test_cancelling_the_call_aborts_the_request_in_the_engine(tmp_path: Path) -> None:
    worker = serving(tmp_path, never_returns)
    task = asyncio.create_task(worker.call(a_request()))
    await until(lambda: worker.engine.leases)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    slot, nonce = worker.engine.leases[0]
    assert (worker.engine.aborted, worker.board.get(slot, Word.RELEASED)) == (1, nonce)


async def test_the_slot_of_a_request_that_the_engine_gave_up_waits_for_the_engines_word(tmp_path: Path) -> None:
    """Or its late word would wipe out the outcome of the slot's next lease, whose call would never end."""
    worker = serving(tmp_path, fails(UnavailableError("given up", code="engine_aborted")))
    await worker.refused()
    with pytest.raises(UnavailableError, match="slots"):
        worker.leases.open()
    worker.end_lease(Outcome.ABORTED)
    assert worker.leases.open().slot == worker.engine.leases[0][0]


async def test_the_slot_of_a_request_that_never_reached_the_engine_is_free_at_once(tmp_path: Path) -> None:
    worker = serving(tmp_path, fails(InvalidRequestError("no such token")))
    await worker.refused()
    assert worker.leases.open().slot == 0
