"""Leases as the prefill service sees them."""

from pathlib import Path

import pytest

from kv_transfer.board import Board, Outcome, Word
from kv_transfer.leases import LeaseTable
from slipstream.errors import UnavailableError


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board.create(tmp_path, slots=2)


def end(board: Board, lease: object, outcome: Outcome) -> None:
    board.put(lease.slot, Word.OUTCOME, lease.nonce | outcome)  # type: ignore[attr-defined]


def test_when_all_slots_are_taken_the_next_is_refused_and_the_setting_named(board: Board) -> None:
    table = LeaseTable(board, lease_s=30)
    table.open(), table.open()
    with pytest.raises(UnavailableError, match=r"transfer\.board_slots") as caught:
        table.open()
    assert caught.value.code == "worker_busy"


def test_a_slot_is_not_given_again_before_the_engine_has_ended_the_lease(board: Board) -> None:
    table = LeaseTable(board, lease_s=30)
    held, other = table.open(), table.open()
    held.seen_by_engine = True
    table.close(held)
    with pytest.raises(UnavailableError):
        table.open()
    end(board, held, Outcome.RELEASED)
    assert table.open().slot == held.slot
    assert table.open_count == 2
    assert other.slot != held.slot


def test_a_lease_the_engine_never_saw_is_free_at_once(board: Board) -> None:
    table = LeaseTable(board, lease_s=30)
    for _ in range(10):
        table.close(table.open())
    assert table.open_count == 0


def test_a_lease_the_engine_lost_sight_of_is_taken_back_after_its_time(board: Board) -> None:
    table = LeaseTable(board, lease_s=0.0)
    for _ in range(10):
        lease = table.open()
        lease.seen_by_engine = True
        table.close(lease)
    assert table.open_count == 0


def test_closing_writes_the_release_once_and_may_be_repeated(board: Board) -> None:
    table = LeaseTable(board, lease_s=30)
    lease = table.open()
    lease.seen_by_engine = True
    table.close(lease)
    table.close(lease)
    assert board.get(lease.slot, Word.RELEASED) == lease.nonce
    assert table.open_count == 0


def test_renewing_moves_the_deadline(board: Board) -> None:
    table = LeaseTable(board, lease_s=30)
    lease = table.open()
    first = board.get(lease.slot, Word.DEADLINE)
    table.renew(lease)
    assert board.get(lease.slot, Word.DEADLINE) >= first


def test_a_new_lease_in_a_used_slot_has_no_outcome_yet(board: Board) -> None:
    table = LeaseTable(board, lease_s=30)
    lease = table.open()
    lease.seen_by_engine = True
    end(board, lease, Outcome.TAKEN)
    assert table.outcome(lease) is Outcome.TAKEN
    table.close(lease)
    again = table.open()
    assert again.slot == lease.slot
    assert table.outcome(again) is None
