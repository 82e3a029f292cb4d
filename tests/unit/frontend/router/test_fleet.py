"""What a fleet knows of its workers' load, joined from three sources."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.depths import Depths
from frontend.router import Ask, Fleet
from frontend.router.candidate import Share
from frontend.router.cost import prompt_queue_s
from frontend.router.fleet import FOREIGN_PROMPT_TOKENS
from slipstream.v1.registry_pb2 import Load, Role, WorkerRecord
from tests.unit.frontend.router.workers import DECODE, PREFILL, PROFILE, fleet_of, worker


def said(worker_id: str, renewals: int, **load: int) -> WorkerRecord:
    record = worker(worker_id, PREFILL).record
    record.renewals = renewals
    record.load.CopyFrom(Load(**load))
    return record


def begin(fleet: Fleet, worker_id: str = "w", tokens: int = 10, now_s: float = 0.0) -> Share:
    share = fleet.begin(worker_id, tokens, tokens, now_s)
    assert share is not None
    return share


def load_of(fleet: Fleet, worker_id: str = "w") -> tuple[int, int]:
    """Requests in all, and waiting prompt tokens of others."""
    one = fleet.get(worker_id)
    assert one is not None
    return one.requests + one.foreign.requests, one.foreign.waiting_tokens


def test_a_workers_own_figures_do_not_count_this_frontends_requests_twice() -> None:
    fleet = fleet_of([worker("w", PREFILL)])
    for _ in range(3):
        begin(fleet)
    fleet.put(said("w", 1, running=4, waiting=1))
    assert load_of(fleet) == (5, 2 * FOREIGN_PROMPT_TOKENS)
    begin(fleet)
    assert load_of(fleet)[0] == 6, "a request sent since is known at once"


def test_figures_that_still_show_finished_requests_are_not_taken_for_others() -> None:
    fleet = fleet_of([worker("w", PREFILL)])
    for share in [begin(fleet) for _ in range(3)]:
        share.end(1.0)
    fleet.put(said("w", 1, running=3))
    assert load_of(fleet) == (0, 0)
    fleet.put(said("w", 2, running=3))
    assert load_of(fleet)[0] == 3, "a second look shows that they are others'"


def test_a_feed_says_exactly_what_others_do_and_is_believed_over_the_record() -> None:
    fleet = fleet_of([worker("w", PREFILL)])
    begin(fleet)
    fleet.note_load("w", Load(running=3, waiting_tokens=900), Load(running=1, waiting_tokens=100), 0.0)
    assert load_of(fleet) == (3, 800)
    fleet.put(said("w", 1, running=50))
    assert load_of(fleet) == (3, 800), "the record is older"
    fleet.lose_feed("w")
    fleet.put(said("w", 2, running=50))
    assert load_of(fleet)[0] == 50


def test_work_on_a_worker_that_is_gone_for_a_moment_is_not_forgotten() -> None:
    fleet = fleet_of([worker("busy", PREFILL), worker("idle", PREFILL)])
    share = begin(fleet, "busy")
    fleet.apply([])
    assert fleet.get("busy") is None
    fleet.put(worker("busy", PREFILL).record)
    assert load_of(fleet, "busy")[0] == 1
    share.end(1.0)
    assert load_of(fleet, "busy")[0] == 0


def test_a_restarted_worker_has_nothing_of_its_former_lifes_work() -> None:
    fleet = fleet_of([worker("w", PREFILL)])
    share = begin(fleet)
    fleet.put(worker("w", PREFILL, epoch=2).record)
    assert load_of(fleet)[0] == 0
    share.end(1.0)
    assert load_of(fleet)[0] == 0


def test_the_prompt_in_work_is_less_to_wait_for_as_time_goes_by_but_never_more_than_it() -> None:
    fleet = fleet_of([worker("w", PREFILL, profile=PROFILE)])
    pool = fleet.pool("m", PREFILL)
    assert pool is not None
    first, _ = begin(fleet, tokens=1000), begin(fleet, tokens=1000)
    one_s = 0.101

    def queue_s(now_s: float) -> float:
        return float(prompt_queue_s(pool, now_s, 0.0)[0])

    assert queue_s(0.0) == pytest.approx(2 * one_s)
    assert queue_s(0.05) == pytest.approx(2 * one_s - 0.05)
    assert queue_s(9.0) == pytest.approx(one_s), "the first one takes longer than was predicted"
    first.prompt_done(9.0)
    assert queue_s(9.0) == pytest.approx(one_s)
    assert queue_s(9.1) == pytest.approx(one_s - 0.1)


def test_a_worker_that_changes_its_role_keeps_its_place_its_work_and_what_was_learnt_of_it() -> None:
    fleet = fleet_of([worker("w", PREFILL, profile=PROFILE), worker("other", DECODE)])
    share, one = begin(fleet), fleet.get("w")
    assert one is not None
    one.prefill.note(1.0, 0.1)
    slot, factor = one.slot, one.prefill.factor
    prefills, decodes = fleet.pool("m", PREFILL), fleet.pool("m", DECODE)
    assert prefills is not None
    assert decodes is not None
    for role, of, others in ((DECODE, decodes, prefills), (PREFILL, prefills, decodes)):
        record = worker("w", role).record
        record.renewals = role
        assert fleet.put(record) is one
        assert one in of.members
        assert one not in others.members
        assert (one.slot, one.pool, one.record, one.prefill.factor) == (slot, of, record, factor)
        assert (of.slots[one.row], of.own_requests[one.row], of.pending_s[one.row]) == (slot, 1, share.prompt_s)
    share.end(1.0)
    assert (prefills.own_requests[one.row], prefills.pending_s[one.row]) == (0, 0)


def test_others_prompts_are_computed_too_while_a_worker_says_nothing() -> None:
    fleet = fleet_of([worker("w", PREFILL, profile=PROFILE)])
    pool, one = fleet.pool("m", PREFILL), fleet.get("w")
    assert pool is not None
    assert one is not None

    def queue_s(now_s: float) -> float:
        return float(prompt_queue_s(pool, now_s, 0.0)[0])

    fleet.note_load("w", Load(running=2, waiting_tokens=2048), Load(), 1.0)
    foreign_s = one.foreign_s
    assert queue_s(1.0) == pytest.approx(foreign_s)
    assert queue_s(1.1) == pytest.approx(foreign_s - 0.1)
    share = begin(fleet, tokens=1000, now_s=1.1)
    assert queue_s(1.1) == pytest.approx(foreign_s - 0.1 + 0.101)
    assert queue_s(9.0) == 0.0, "the one in work takes longer than was predicted"
    share.prompt_done(9.0)
    assert queue_s(9.0) == 0.0
    begin(fleet, tokens=1000, now_s=9.5)
    assert queue_s(9.5) == pytest.approx(0.101), "idle time is not made up for"
    fleet.note_load("w", Load(running=1), Load(running=1), 9.55)
    assert queue_s(9.55) == pytest.approx(0.051)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["put", "flip", "remove", "begin", "end"])), max_size=60))
def test_vectors_say_the_same_as_the_workers_themselves(steps: list[tuple[int, str]]) -> None:
    fleet, open_shares, roles = Fleet(), dict[str, list[Share]](), dict[str, Role.ValueType]()
    for number, step in steps:
        name = f"w{number}"
        if step in ("put", "flip"):
            if step == "flip":
                roles[name] = PREFILL if roles.get(name, DECODE) == DECODE else DECODE
            fleet.put(worker(name, roles.get(name, DECODE), blocks=100 + number).record)
        elif step == "remove" and fleet.get(name):
            fleet.remove(name)
        elif step == "begin" and fleet.get(name):
            open_shares.setdefault(name, []).append(begin(fleet, name))
        elif step == "end" and open_shares.get(name):
            open_shares[name].pop().end(1.0)
    members = [(pool, row, one) for pool in fleet.pools.values() for row, one in enumerate(pool.members)]
    for pool, row, one in members:
        assert pool is fleet.pool("m", roles.get(one.worker_id, DECODE))
        assert (one.row, one.pool, fleet.get(one.worker_id)) == (row, pool, one)
        assert (pool.requests[row], pool.blocks[row], pool.slots[row]) == (
            one.requests,
            100 + int(one.worker_id[1]),
            one.slot,
        )
        assert one.requests == len(open_shares.get(one.worker_id, []))
    assert len({one.slot for _, _, one in members}) == len(members)


def test_what_is_known_may_come_by_name_or_by_slot() -> None:
    fleet = fleet_of([worker(f"w{index}", DECODE) for index in range(4)])
    pool = fleet.pool("m", DECODE)
    third = fleet.get("w3")
    assert pool is not None
    assert third is not None
    by_slot = Depths.of({third.slot: 64}, fleet.slots)
    named, numbered = pool.known(Ask("m", 100, known={"w3": 64})), pool.known(Ask("m", 100, known_by_slot=by_slot))
    assert named is not None
    assert numbered is not None
    assert list(named) == list(numbered) == [0, 0, 0, 64]
    assert pool.known(Ask("m", 100)) is None
    shortened = pool.known(Ask("m", 60, known={"w3": 64}))
    assert shortened is not None
    assert shortened[3] == 59, "the last token is always computed"
