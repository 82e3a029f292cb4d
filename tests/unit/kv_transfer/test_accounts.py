"""What each request cost, and what the sums on the board say."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_transfer.accounts import FAILURES, Accounts, TransferReport
from kv_transfer.board import Board, Counter


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board.create(tmp_path, slots=2)


@pytest.fixture
def accounts(board: Board) -> Accounts:
    return Accounts(board)


def test_prompt_tokens_are_computed_cached_or_received(board: Board, accounts: Accounts) -> None:
    accounts.expect("a", 100, 64)
    accounts.book("a", TransferReport(blocks=4, bytes_moved=400, wire_bytes=300, path="shm/direct"))
    accounts.first_step("a", 100, 80, 20)  # 16 tokens came from the prefix cache
    accounts.next_step("a", 100, 1)  # an answer's token is no prompt token
    account = accounts.close("a")
    assert account is not None
    assert (account["computed_tokens"], account["cached_tokens"], account["received_tokens"]) == (20, 16, 64)
    assert board.counter(Counter.PROMPT_TOKENS_COMPUTED) == 20
    assert board.counter(Counter.PROMPT_TOKENS_CACHED) == 16
    assert board.counter(Counter.PROMPT_TOKENS_RECEIVED) == 64


def test_chunks_add_up_to_the_prompt(accounts: Accounts) -> None:
    accounts.first_step("a", 100, 0, 48)
    accounts.next_step("a", 48, 48)
    accounts.next_step("a", 96, 16)  # speculated tokens are not the prompt's
    account = accounts.close("a")
    assert account is not None
    assert account["computed_tokens"] == 100


def test_what_was_to_be_received_and_failed_is_computed(board: Board, accounts: Accounts) -> None:
    accounts.expect("a", 100, 96)
    accounts.book("a", TransferReport(failure="digest", resent=9, path="shm/staged"))
    accounts.first_step("a", 100, 0, 100)
    account = accounts.close("a")
    assert account is not None
    assert (account["computed_tokens"], account["received_tokens"], account["failure"]) == (100, 0, "digest")
    assert board.counter(Counter.SPANS_RESENT) == 9
    assert board.counter(Counter.TRANSFERS_DONE) == 0


@pytest.mark.parametrize(
    ("path", "counter"),
    [
        ("shm/direct", Counter.BYTES_SHM_DIRECT),
        ("shm/staged", Counter.BYTES_SHM_STAGED),
        ("ucx/tcp/eth0", Counter.BYTES_UCX),
        ("nixl/UCX", Counter.BYTES_NIXL),
    ],
)
def test_bytes_are_counted_by_way(board: Board, accounts: Accounts, path: str, counter: Counter) -> None:
    accounts.book(
        "a", TransferReport(blocks=3, bytes_moved=300, wire_bytes=100, seconds=0.5, exposed_s=0.25, path=path)
    )
    assert board.counter(counter) == board.counter(Counter.BYTES_RECEIVED) == 300
    assert board.counter(Counter.WIRE_BYTES) == 100
    assert board.counter(Counter.BLOCKS_RECEIVED) == 3
    assert (board.counter(Counter.TRANSFER_NS), board.counter(Counter.EXPOSED_NS)) == (500_000_000, 250_000_000)
    assert board.counter(Counter.TRANSFERS_DONE) == 1


def failures(board: Board) -> dict[Counter, int]:
    counters = {*FAILURES.values(), Counter.FAILED_OTHER}
    return {counter: board.counter(counter) for counter in counters if board.counter(counter)}


@pytest.mark.parametrize("code", [*FAILURES, "something else"])
def test_a_failure_counts_by_its_cause_when_the_prompt_is_computed_instead(
    board: Board, accounts: Accounts, code: str
) -> None:
    accounts.expect("a", 100, 96)
    accounts.book("a", TransferReport(failure=code))
    assert failures(board) == {}
    accounts.first_step("a", 100, 0, 100)
    accounts.close("a")
    assert failures(board) == {FAILURES.get(code, Counter.FAILED_OTHER): 1}


@pytest.mark.parametrize("known", [True, False])
def test_a_failure_of_a_request_that_was_abandoned_is_a_cancellation(
    board: Board, accounts: Accounts, known: bool
) -> None:
    if known:
        accounts.expect("a", 100, 96)
    accounts.book("a", TransferReport(failure="worker_gone"))
    accounts.close("a")
    assert failures(board) == {Counter.FAILED_CANCELLED: 1}


def test_a_request_that_never_ran_has_no_account(accounts: Accounts) -> None:
    assert accounts.close("a") is None
