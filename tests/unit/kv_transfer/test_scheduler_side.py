"""What the scheduler's half decides, step by step; requests and steps are vLLM's own, as far as they are read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer.accounts import TransferReport
from kv_transfer.board import Board, Counter, Outcome, Word
from kv_transfer.handoff import Handoff, digest_tokens
from kv_transfer.scheduler_side import ACCOUNT, RECEIVE, SEND, SchedulerSide, Step

BLOCK_TOKENS = 16
PROMPT = list(range(1000, 1100))
ID = bytes(range(16))
NONCE = 80
KEY, TOKEN = b"k" * 32, b"t" * 32


@dataclass
class Request:
    """The fields of vLLM's `Request` that are read."""

    request_id: str = "r"
    prompt_token_ids: list[int] = field(default_factory=lambda: list(PROMPT))
    kv_transfer_params: dict[str, Any] | None = None
    answered: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.answered


@dataclass
class _New:
    req_id: str
    prompt_token_ids: list[int]
    num_computed_tokens: int


@dataclass
class _Cached:
    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


class _Tables:
    def __init__(self, tables: dict[str, list[int]]) -> None:
        self._tables = tables

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...] | None:
        table = self._tables.get(request_id)
        return (table,) if table is not None else None


@dataclass
class Output:
    """The fields of vLLM's `SchedulerOutput` that are read."""

    scheduled_new_reqs: list[_New] = field(default_factory=list)
    scheduled_cached_reqs: _Cached = field(default_factory=_Cached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    preempted_req_ids: set[str] | None = None
    kv_connector_block_state: _Tables | None = None

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


def a_step(request: Request, computed: int, scheduled: int, *, new: bool, preempted: bool = False) -> Output:
    blocks = -(-(computed + scheduled) // BLOCK_TOKENS)
    output = Output(
        num_scheduled_tokens={request.request_id: scheduled},
        kv_connector_block_state=_Tables({request.request_id: list(range(100, 100 + blocks))}),
        preempted_req_ids={request.request_id} if preempted else None,
    )
    if new:
        output.scheduled_new_reqs.append(_New(request.request_id, request.prompt_token_ids, computed))
    else:
        output.scheduled_cached_reqs = _Cached([request.request_id], [computed])
    return output


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board.create(tmp_path, slots=4)


@pytest.fixture
def side(board: Board) -> SchedulerSide:
    return SchedulerSide(board, block_tokens=BLOCK_TOKENS, lease_s=30.0)


def receiving(patience_s: float = 0.0) -> Request:
    return Request(kv_transfer_params={RECEIVE: [ID, "host:1", 7, [], patience_s, KEY, TOKEN]})


def sending(*, cached_only: bool = False, tokens: int = 100) -> Request:
    return Request(prompt_token_ids=PROMPT[:tokens], kv_transfer_params={SEND: [1, NONCE, ID, cached_only, TOKEN, KEY]})


def receivable(side: SchedulerSide, request: Request, local: int = 0) -> int | None:
    return side.receivable_tokens(request, local)


def take(side: SchedulerSide, output: Output | None = None) -> Step:
    return side.take_step(output or Output())


def finish(side: SchedulerSide, request: Request, *, completed: bool = True) -> tuple[bool, dict[str, Any] | None]:
    return side.finish(request, completed=completed)


def begun(side: SchedulerSide, request: Request, tokens: int = 100, local: int = 0) -> int | None:
    """The sender has begun to compute the request's prompt."""
    assert receivable(side, request, local) is None
    side.take_started({"r": {0: (tokens, digest_tokens(PROMPT[:tokens]))}})
    return receivable(side, request, local)


# -- receiving --------------------------------------------------------------------------------------------


def test_a_request_without_a_handoff_is_computed(side: SchedulerSide) -> None:
    assert receivable(side, Request()) == 0
    assert take(side).opens == []


def test_a_handoff_is_opened_once_and_waited_for_without_blocks(side: SchedulerSide) -> None:
    request = receiving()
    assert [receivable(side, request) for _ in range(3)] == [None] * 3
    assert take(side).opens == [("r", Handoff(ID, "host:1", 7, KEY, TOKEN))]
    assert take(side).opens == []


def test_all_but_the_last_token_is_received(side: SchedulerSide) -> None:
    request = receiving()
    assert begun(side, request) == 99
    side.start_load(request, list(range(50, 57)), 99)
    (load,) = take(side).loads
    assert (load.request_id, load.first, load.targets) == ("r", 0, list(range(50, 57)))


def test_what_the_prefix_cache_has_is_not_received(side: SchedulerSide) -> None:
    request = receiving()
    assert begun(side, request, local=32) == 67
    side.start_load(request, list(range(50, 57)), 67)
    (load,) = take(side).loads
    assert (load.first, load.targets) == (2, list(range(52, 57)))


def test_a_block_that_only_the_last_token_needs_is_not_asked_for(side: SchedulerSide) -> None:
    request = Request(prompt_token_ids=PROMPT[:97], kv_transfer_params=receiving().kv_transfer_params)
    assert begun(side, request, tokens=97) == 96
    side.start_load(request, list(range(50, 57)), 96)
    assert take(side).loads[0].targets == list(range(50, 56))


def test_a_prefix_cache_that_has_it_all_needs_no_sender(side: SchedulerSide) -> None:
    assert receivable(side, receiving(), local=99) == 0
    assert take(side).opens == []


def test_a_prefix_cache_that_has_it_meanwhile_gives_the_handoff_up(side: SchedulerSide) -> None:
    request = receiving()
    assert begun(side, request) == 99
    assert receivable(side, request, local=99) == 0
    assert take(side).cancels == ["r"]
    assert receivable(side, request) == 0


@pytest.mark.parametrize(
    ("tokens", "digest"), [(100, 1), (64, digest_tokens(PROMPT)), (101, digest_tokens([*PROMPT, 5]))]
)
def test_another_prompts_blocks_are_refused(side: SchedulerSide, board: Board, tokens: int, digest: int) -> None:
    request = receiving()
    assert receivable(side, request) is None
    side.take_started({"r": {0: (tokens, digest)}})
    assert receivable(side, request) == 0
    assert take(side).cancels == ["r"]
    side.take_reports({"r": {0: TransferReport(failure="cancelled")}})
    take(side, a_step(request, 0, 100, new=True))
    assert board.counter(Counter.FAILED_OTHER) == 1
    assert board.counter(Counter.FAILED_CANCELLED) == 0


def test_a_sender_that_does_not_begin_is_given_up_when_patience_ends(side: SchedulerSide, board: Board) -> None:
    request = receiving(patience_s=0.2)
    assert receivable(side, request) is None
    time.sleep(0.25)
    assert receivable(side, request) == 0
    step = take(side)
    assert ([request_id for request_id, _ in step.opens], step.cancels) == (["r"], ["r"])
    side.take_reports({"r": {0: TransferReport(failure="cancelled")}})
    take(side, a_step(request, 0, 100, new=True))
    assert board.counter(Counter.FAILED_TIMEOUT) == 1
    side.take_started({"r": {0: (100, digest_tokens(PROMPT))}})  # too late
    assert receivable(side, request) == 0
    held, out = finish(side, request)
    assert not held
    assert out is not None
    assert out[ACCOUNT]["failure"] == "timeout"


def test_a_failure_before_the_start_means_computing_here(side: SchedulerSide, board: Board) -> None:
    request = receiving()
    assert receivable(side, request) is None
    side.take_reports({"r": {0: TransferReport(failure="worker_gone")}})
    assert receivable(side, request) == 0
    assert take(side).cancels == []
    take(side, a_step(request, 0, 100, new=True))
    assert board.counter(Counter.FAILED_WORKER_GONE) == 1


def test_after_a_failed_load_or_a_preemption_nothing_is_asked_for_again(side: SchedulerSide) -> None:
    request = receiving()
    assert begun(side, request) == 99
    side.start_load(request, list(range(7)), 99)
    assert receivable(side, request) == 0
    side.take_reports({"r": {0: TransferReport(failure="digest")}})
    assert receivable(side, request) == 0
    side.start_load(request, list(range(7)), 99)
    assert len(take(side).loads) == 1


def test_a_load_that_went_well_is_in_the_account(side: SchedulerSide) -> None:
    request = receiving()
    assert begun(side, request) == 99
    side.start_load(request, list(range(7)), 99)
    side.take_reports({"r": {0: TransferReport(blocks=7, bytes_moved=700, path="shm/direct")}})
    take(side, a_step(request, 99, 1, new=True))
    _, out = finish(side, request)
    assert out is not None
    assert (out[ACCOUNT]["received_tokens"], out[ACCOUNT]["computed_tokens"]) == (99, 1)
    assert out[ACCOUNT]["cached_tokens"] == 0


@pytest.mark.parametrize("stage", ["opened", "started", "loading", "over"])
def test_a_request_that_ends_while_it_waits_is_cancelled_once(side: SchedulerSide, stage: str) -> None:
    request = receiving()
    assert receivable(side, request) is None
    if stage != "opened":
        side.take_started({"r": {0: (100, digest_tokens(PROMPT))}})
    if stage in ("loading", "over"):
        side.start_load(request, list(range(7)), 99)
    if stage == "over":
        side.take_reports({"r": {0: TransferReport(blocks=7, bytes_moved=700, path="shm/direct")}})
    assert finish(side, request, completed=False)[0] is False
    assert take(side).cancels == ([] if stage == "over" else ["r"])


# -- several ranks ----------------------------------------------------------------------------------------


@pytest.fixture
def of_two_ranks(board: Board) -> SchedulerSide:
    return SchedulerSide(board, block_tokens=BLOCK_TOKENS, lease_s=30.0, ranks=2)


def test_a_prompt_is_received_once_its_sender_has_begun_for_all_ranks(of_two_ranks: SchedulerSide) -> None:
    request = receiving()
    assert receivable(of_two_ranks, request) is None
    begun_there = (100, digest_tokens(PROMPT))
    of_two_ranks.take_started({"r": {1: begun_there}})
    assert receivable(of_two_ranks, request) is None
    of_two_ranks.take_started({"r": {0: begun_there}})
    assert receivable(of_two_ranks, request) == 99


def test_a_sender_whose_ranks_compute_different_prompts_is_not_believed(of_two_ranks: SchedulerSide) -> None:
    request = receiving()
    assert receivable(of_two_ranks, request) is None
    other = (90, digest_tokens(PROMPT[:90]))
    of_two_ranks.take_started({"r": {0: (100, digest_tokens(PROMPT)), 1: other}})
    assert receivable(of_two_ranks, request) == 0
    assert take(of_two_ranks).cancels == ["r"]


def test_a_failure_on_one_rank_ends_the_transfer_on_all(of_two_ranks: SchedulerSide, board: Board) -> None:
    side, request = of_two_ranks, receiving()
    assert receivable(side, request) is None
    side.take_started({"r": dict.fromkeys((0, 1), (100, digest_tokens(PROMPT)))})
    assert receivable(side, request) == 99
    side.start_load(request, list(range(7)), 99)
    take(side)
    side.take_reports({"r": {1: TransferReport(failure="digest")}})
    assert take(side).cancels == ["r"]
    side.take_reports({"r": {0: TransferReport(failure="cancelled")}})
    assert take(side).cancels == []
    take(side, a_step(request, 0, 100, new=True))
    assert board.counter(Counter.FAILED_DIGEST) == 1
    assert board.counter(Counter.FAILED_CANCELLED) == 0


def test_a_lease_ends_when_it_has_ended_on_all_ranks_and_as_the_worst_of_them(
    of_two_ranks: SchedulerSide, board: Board
) -> None:
    request = sending()
    run_prompt(of_two_ranks, request, [100])
    assert finish(of_two_ranks, request)[0]
    of_two_ranks.take_ended({"r": Outcome.RELEASED})
    of_two_ranks.take_ended({"r": Outcome.TAKEN})
    assert board.get(1, Word.HELD) == NONCE
    of_two_ranks.release({"r"})
    assert board.outcome(1, NONCE) is Outcome.RELEASED
    assert board.get(1, Word.HELD) == 0


# -- sending ----------------------------------------------------------------------------------------------


def run_prompt(
    side: SchedulerSide, request: Request, chunks: list[int], *, cached: int = 0, preempt_at: set[int] | None = None
) -> list[Step]:
    """Compute the prompt in these chunks; before the chunks in `preempt_at` all that was computed is lost."""
    assert receivable(side, request, cached) == 0
    steps, computed, new = [], cached, True
    for number, chunk in enumerate(chunks):
        preempted = number in (preempt_at or set()) and not new
        if preempted:
            computed = 0
        scheduled = min(chunk, request.num_prompt_tokens - computed)
        if scheduled == 0:
            break
        steps.append(take(side, a_step(request, computed, scheduled, new=new, preempted=preempted)))
        computed, new = computed + scheduled, False
    if computed < request.num_prompt_tokens:
        rest = request.num_prompt_tokens - computed
        steps.append(take(side, a_step(request, computed, rest, new=new)))
    steps.append(take(side, a_step(request, request.num_prompt_tokens, 1, new=False)))
    return steps


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    tokens=st.integers(1, 100),
    chunks=st.lists(st.integers(1, 40), max_size=12),
    cached_blocks=st.integers(0, 6),
    preempt_at=st.sets(st.integers(0, 12), max_size=2),
)
def test_however_a_prompt_is_chunked_each_block_is_published_once(
    board: Board, tokens: int, chunks: list[int], cached_blocks: int, preempt_at: set[int]
) -> None:
    board.put(1, Word.OUTCOME, 0)
    side = SchedulerSide(board, block_tokens=BLOCK_TOKENS, lease_s=30.0)
    cached = min(cached_blocks * BLOCK_TOKENS, (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
    published: list[int] = []
    finals = 0
    for step in run_prompt(side, sending(tokens=tokens), chunks, cached=cached, preempt_at=preempt_at):
        if step.resets:
            published, finals = [], 0
        for send in step.sends:
            if send.begin is not None:
                assert send.begin == (tokens, digest_tokens(PROMPT[:tokens]))
                assert published == []
                published += range(send.ready)
            published += range(send.first, send.end)
            assert send.end <= len(send.block_ids)
            finals += send.final
    assert published == list(range(-(-tokens // BLOCK_TOKENS)))
    assert finals == 1


def test_a_preempted_prompt_is_fenced_off_before_it_begins_anew(side: SchedulerSide, board: Board) -> None:
    steps = run_prompt(side, sending(), [40, 40, 100], preempt_at={2})
    assert [step.resets for step in steps] == [[], [], [ID], []]
    assert [bool(send.begin) for step in steps for send in step.sends] == [True, False, True]
    assert board.counter(Counter.HANDOFFS_RESET) == 1


def test_a_completed_prompt_is_held_for_its_receiver(side: SchedulerSide, board: Board) -> None:
    request = sending()
    run_prompt(side, request, [100])
    held, _ = finish(side, request)
    assert held
    (hold,) = take(side).holds
    assert (hold.request_id, hold.handoff_id) == ("r", ID)
    assert board.get(1, Word.HELD) == NONCE
    assert board.counter(Counter.HANDOFFS_HELD) == 1
    side.take_ended({"r": Outcome.TAKEN})
    assert board.outcome(1, NONCE) is None
    side.release({"r"})
    side.publish_gauges()
    assert board.outcome(1, NONCE) is Outcome.TAKEN
    assert board.counter(Counter.HANDOFFS_TAKEN) == 1
    assert board.get(1, Word.HELD) == 0
    assert board.counter(Counter.HANDOFFS_HELD) == 0


def test_the_ranks_are_told_once_that_a_lease_was_released_and_free_the_blocks(
    side: SchedulerSide, board: Board
) -> None:
    request = sending()
    run_prompt(side, request, [100])
    finish(side, request)
    assert take(side).over == []
    board.put(1, Word.RELEASED, NONCE)
    assert take(side).over == [("r", Outcome.RELEASED)]
    assert take(side).over == []
    assert board.get(1, Word.HELD) == NONCE  # until they say that nothing of it is on its way any more
    side.take_ended({"r": Outcome.RELEASED})
    side.release({"r"})
    assert board.outcome(1, NONCE) is Outcome.RELEASED


def test_a_lease_expires_unless_it_is_renewed(board: Board) -> None:
    side = SchedulerSide(board, block_tokens=BLOCK_TOKENS, lease_s=0.0)
    request = sending()
    run_prompt(side, request, [100])
    board.put(1, Word.DEADLINE, time.monotonic_ns() + int(60e9))
    finish(side, request)
    for _ in range(3):
        assert take(side).over == []
    board.put(1, Word.DEADLINE, time.monotonic_ns() - 1)
    assert take(side).over == [("r", Outcome.EXPIRED)]


@pytest.mark.parametrize("why", ["aborted", "released", "never scheduled"])
def test_a_prompt_that_nobody_gets_is_not_held(side: SchedulerSide, board: Board, why: str) -> None:
    request = sending()
    if why != "never scheduled":
        run_prompt(side, request, [100])
    if why == "released":
        board.put(1, Word.RELEASED, NONCE)
    assert finish(side, request, completed=why != "aborted")[0] is False
    assert take(side).ends == [(ID, "lease_ended")]
    assert board.outcome(1, NONCE) is Outcome.ABORTED
    assert board.get(1, Word.HELD) == 0
    # What began has ended, in the figures too.
    assert board.counter(Counter.HANDOFFS_OPENED) == (why != "never scheduled")
    assert board.counter(Counter.HANDOFFS_ABORTED) == board.counter(Counter.HANDOFFS_OPENED)


def test_only_what_the_prefix_cache_has_is_sent_when_that_was_asked(side: SchedulerSide, board: Board) -> None:
    request = sending(cached_only=True)
    assert receivable(side, request, 96) is None  # 99 are asked for
    assert receivable(side, request, 96) is None
    assert take(side).ends == [(ID, "not_cached")]
    assert board.outcome(1, NONCE) is Outcome.NOT_CACHED
    assert board.counter(Counter.HANDOFFS_NOT_CACHED) == 1
    assert finish(side, request, completed=False)[0] is False
    assert board.outcome(1, NONCE) is Outcome.NOT_CACHED


def test_what_the_prefix_cache_has_is_ready_before_the_step(side: SchedulerSide) -> None:
    request = sending(cached_only=True, tokens=97)
    assert receivable(side, request, 96) == 0
    (send,) = take(side, a_step(request, 96, 1, new=True)).sends
    assert send.begin == (96, digest_tokens(PROMPT[:96]))
    assert (send.ready, send.first, send.end, send.final) == (6, 6, 6, True)
