"""The prefill service's leases, with an engine that only fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.admission import Admission
from engine.protocol import PromptComputed
from kv_transfer.board import Board, Outcome, Word
from kv_transfer.leases import LeaseTable
from prefill_worker.service import PrefillService
from slipstream.errors import InvalidRequestError, SlipstreamError, UnavailableError
from slipstream.v1.worker_pb2 import PrefillRequest


class FailingEngine:
    """Notes the leases it was given, and fails."""

    def __init__(self, error: SlipstreamError) -> None:
        self.error = error
        self.leases: list[tuple[int, int]] = []

    async def prefill(self, request_id: str, token_ids: Sequence[int], lease: tuple[int, int]) -> PromptComputed:
        self.leases.append(lease)
        raise self.error


class EndedCallError(Exception):
    """What gRPC raises in `abort`."""


class Context:
    async def abort(self, *status: Any) -> None:
        raise EndedCallError


async def call(service: PrefillService) -> None:
    events = service.Prefill(PrefillRequest(token_ids=[1, 2]), Context())  # type: ignore[arg-type]
    with pytest.raises(EndedCallError):
        await anext(aiter(events))


def serving(board: Board, error: SlipstreamError) -> tuple[PrefillService, FailingEngine, LeaseTable]:
    engine, leases = FailingEngine(error), LeaseTable(board, lease_s=30)
    service = PrefillService(engine, leases, Admission(limit=4), model="tiny", lease_s=30)  # type: ignore[arg-type]
    return service, engine, leases


async def test_the_slot_of_a_request_that_the_engine_gave_up_waits_for_the_engines_word(tmp_path: Path) -> None:
    """Or its late word would wipe out the outcome of the slot's next lease, whose call would never end."""
    board = Board.create(tmp_path, slots=1)
    service, engine, leases = serving(board, UnavailableError("given up", code="engine_aborted"))
    await call(service)
    with pytest.raises(UnavailableError, match="slots"):
        leases.open()
    slot, nonce = engine.leases[0]
    board.put(slot, Word.OUTCOME, nonce | Outcome.ABORTED)
    assert leases.open().slot == slot


async def test_the_slot_of_a_request_that_never_reached_the_engine_is_free_at_once(tmp_path: Path) -> None:
    service, _, leases = serving(Board.create(tmp_path, slots=1), InvalidRequestError("no such token"))
    await call(service)
    assert leases.open().slot == 0
