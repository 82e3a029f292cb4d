"""The simulated scheduler: what runs in which step, and laws that hold whatever comes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.simulated.request import Event, EventKind, Request, Stage, Step
from engine.simulated.scheduler import Scheduler
from slipstream.errors import ContextLengthError, InvalidRequestError
from slipstream.performance import Profile
from tests.unit.engine.simulated.profiles import PROFILE, profile


def request(name: str, prompt: int, max_tokens: int = 3, family: int = 0, **wishes: bool | int) -> Request:
    """Its prompt is the same as any other's of the same family, as far as both go."""
    keys = [family * 1000 + index for index in range((prompt + max_tokens) // PROFILE.block_tokens)]
    return Request(name, prompt, max_tokens, keys, **wishes)  # type: ignore[arg-type]


def run(scheduler: Scheduler, steps: int = 1000) -> list[tuple[float, Event]]:
    """Steps until there is nothing to do: what happened, and when."""
    now_s, events = 0.0, []
    for _ in range(steps):
        step = scheduler.plan(now_s)
        events += [(now_s, event) for event in scheduler.take_events()]
        if step is None:
            break
        now_s += step.seconds
        events += [(now_s, event) for event in scheduler.finish(step, now_s)]
    return events


def merged(scheduler: Scheduler) -> list[tuple[float, Event]]:
    """As `run`, with as few steps as can be; every second one is shortened."""
    now_s, events, number = 0.0, [], 0
    while (step := scheduler.plan(now_s, most_ticks=1000)) is not None:
        number += 1
        if number % 2:
            scheduler.shorten(step, now_s + step.seconds / 2)
        now_s = step.started_s + step.seconds
        events += [(now_s, event) for event in scheduler.finish(step, now_s)]
    return events


def one_step(scheduler: Scheduler) -> Step:
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.finish(step, 0.0)
    return step


def names(events: list[tuple[float, Event]], kind: EventKind) -> list[str]:
    return [event.request.request_id for _, event in events if event.kind is kind]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 40))
    chunks = [one_step(scheduler).chunks[0] for _ in range(3)]
    assert [(chunk.new_tokens, chunk.before) for chunk in chunks] == [(16, 0), (16, 16), (8, 32)]


def test_requests_that_generate_come_before_prompts() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 8, max_tokens=9))
    one_step(scheduler)
    scheduler.add(request("b", 30, family=1))
    step = one_step(scheduler)
    assert (step.batch, step.chunks[0].new_tokens) == (1, 15)


def test_an_answer_has_all_its_tokens_one_a_step() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 10, max_tokens=5))
    events = run(scheduler)
    assert [event.kind for _, event in events] == [EventKind.PROMPT_COMPUTED, EventKind.FINISHED]
    assert events[0][0] == pytest.approx(0.02)
    assert events[1][0] == pytest.approx(0.02 + 4 * 0.005)
    assert events[1][1].request.generated == 5


def test_a_second_prompt_hits_what_the_first_left_but_never_its_last_token() -> None:
    scheduler = Scheduler(PROFILE)
    for name in ("a", "b"):
        scheduler.add(request(name, 12))
        run(scheduler)
    scheduler.add(again := request("c", 12))
    run(scheduler)
    assert (again.cached_tokens, again.computed_tokens) == (8, 4)


def test_what_was_generated_is_cached_too() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 10, max_tokens=7))
    run(scheduler)
    scheduler.add(again := request("b", 20))
    run(scheduler)
    assert again.cached_tokens == 16  # the last of the 17 tokens was never computed


def test_a_full_cache_preempts_the_last_admitted_which_comes_back_first() -> None:
    scheduler = Scheduler(profile(blocks=8))
    for number, name in enumerate("abc"):
        scheduler.add(request(name, 12 if name != "c" else 5, max_tokens=12, family=number))
    events = run(scheduler)
    assert names(events, EventKind.PREEMPTED)[0] == "b"
    assert names(events, EventKind.FINISHED) == ["a", "b", "c"]
    assert all(event.request.generated == 12 for _, event in events if event.kind is EventKind.FINISHED)


def test_a_prompt_is_not_begun_before_all_of_it_has_room() -> None:
    scheduler = Scheduler(profile(blocks=10))
    scheduler.add(request("a", 17, max_tokens=2))
    scheduler.add(request("b", 30, family=1))
    one_step(scheduler)
    assert one_step(scheduler).chunks[0].request.request_id == "a"
    assert scheduler.load().waiting == 1


def test_a_lower_priority_waits_though_it_came_first() -> None:
    scheduler = Scheduler(profile(max_running=1))
    scheduler.add(request("low", 4, priority=1))
    scheduler.add(request("high", 4, priority=0, family=1))
    assert names(run(scheduler), EventKind.FINISHED) == ["high", "low"]


def test_a_prefill_only_request_holds_its_blocks_until_it_is_released() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 20, max_tokens=0))
    assert names(run(scheduler), EventKind.PROMPT_COMPUTED) == ["a"]
    assert (scheduler.load().blocks_used, scheduler.load().held) == (5, 1)
    scheduler.release("a")
    scheduler.release("a")
    assert (scheduler.load().blocks_used, scheduler.load().held) == (0, 0)


def test_a_receiving_request_takes_blocks_first_and_computes_one_token_when_they_have_come() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(asked := request("a", 20, receives=True), expected=True)
    assert run(scheduler) == []
    assert scheduler.load().blocks_used == 0
    scheduler.started("a")
    assert names(run(scheduler), EventKind.RECEIVING) == ["a"]
    assert scheduler.load().blocks_used == 5
    scheduler.received("a", 19, 0.0)
    assert one_step(scheduler).chunks[0].new_tokens == 1
    assert (asked.computed_tokens, asked.received_tokens) == (1, 19)


@pytest.mark.parametrize("begun", [False, True])
def test_a_transfer_that_fails_is_computed_in_place(begun: bool) -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(asked := request("a", 20, receives=True), expected=True)
    if begun:
        scheduler.started("a")
        run(scheduler)
    scheduler.failed("a")
    assert names(run(scheduler), EventKind.FINISHED) == ["a"]
    assert (asked.computed_tokens, asked.received_tokens) == (20, 0)


def test_nothing_is_received_that_is_cached() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 21))
    run(scheduler)
    scheduler.add(asked := request("b", 21, receives=True))
    assert names(run(scheduler), EventKind.RECEIVING) == []
    assert (asked.cached_tokens, asked.computed_tokens) == (20, 1)


def test_what_must_be_cached_and_is_not_ends_at_once() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 9, max_tokens=0, cached_only=True))
    assert names(run(scheduler), EventKind.NOT_CACHED) == ["a"]
    scheduler.add(request("b", 9))
    run(scheduler)
    scheduler.add(asked := request("c", 9, max_tokens=0, cached_only=True))
    run(scheduler)
    assert (asked.cached_tokens, asked.stage) == (8, Stage.HELD)


def test_an_aborted_request_leaves_nothing_behind() -> None:
    scheduler = Scheduler(PROFILE)
    for number in range(6):
        scheduler.add(request(str(number), 14, max_tokens=20, family=number))
    step = scheduler.plan(0.0)
    assert step is not None
    for number in range(6):
        scheduler.abort(str(number))
    scheduler.finish(step, 0.0)
    assert run(scheduler) == []
    load = scheduler.load()
    assert (load.blocks_used, load.running, load.waiting, load.waiting_tokens, load.context_tokens) == (0, 0, 0, 0, 0)


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="at most 60 fit"):
        Scheduler(PROFILE).add(request("a", 60))
    with pytest.raises(ContextLengthError, match="may have 40 tokens"):
        Scheduler(profile(blocks=8)).add(request("a", 30, max_tokens=10))
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 3))
    with pytest.raises(InvalidRequestError, match="in the engine already"):
        scheduler.add(request("a", 3))


@dataclass(frozen=True)
class Case:
    """One request of a random load; `at` counts steps, `ends_by` says what happens to it."""

    at: int
    prompt: int
    max_tokens: int
    family: int
    priority: int
    receives: bool
    fate: str
    delay: int


CASES = st.lists(
    st.builds(
        Case,
        at=st.integers(0, 12),
        prompt=st.integers(1, 30),
        max_tokens=st.integers(0, 12),
        family=st.integers(0, 3),
        priority=st.integers(0, 1),
        receives=st.booleans(),
        fate=st.sampled_from(["done", "done", "abort", "fail"]),
        delay=st.integers(0, 6),
    ),
    max_size=14,
)
PROFILES = st.builds(profile, blocks=st.integers(12, 24), max_running=st.integers(1, 5), step_tokens=st.integers(4, 32))


class Load:
    """Plays cases against a scheduler, checks its books after every step, writes down what happens."""

    def __init__(self, chosen: Profile, cases: list[Case]) -> None:
        self.scheduler = Scheduler(chosen)
        self.cases = cases
        self.requests = [
            request(str(n), case.prompt, case.max_tokens, case.family, priority=case.priority, receives=case.receives)
            for n, case in enumerate(cases)
        ]
        self.log: list[tuple[int, str, str]] = []
        self.told: set[int] = set()

    def play(self) -> None:
        for turn in range(2000):
            self._outside(turn)
            step = self.scheduler.plan(float(turn))
            self._note(turn, self.scheduler.take_events())
            self.check()
            if step is not None:
                assert sum(chunk.new_tokens for chunk in step.chunks) + step.batch <= self.scheduler.profile.step_tokens
                self._note(turn, self.scheduler.finish(step, float(turn)))
                self.check()
            elif turn > 20 and all(one.stage is Stage.OVER for one in self.requests):
                return
        raise AssertionError("requests starve: " + str([one.stage for one in self.requests]))

    def _outside(self, turn: int) -> None:
        for case, one in zip(self.cases, self.requests, strict=True):
            if case.at == turn:
                self.scheduler.add(one, float(turn), expected=case.receives)
            if turn >= case.at + case.delay:
                if one.stage is Stage.EXPECTING:
                    self.scheduler.started(one.request_id)
                elif one.stage is Stage.RECEIVING:
                    wanted = one.tokens - 1 - one.done
                    if case.fate == "fail":
                        self.scheduler.failed(one.request_id)
                    else:
                        self.scheduler.received(one.request_id, wanted, float(turn))
                if case.fate == "abort":
                    self.scheduler.abort(one.request_id)
                if one.stage is Stage.HELD:
                    self.scheduler.release(one.request_id)

    def _note(self, turn: int, events: list[Event]) -> None:
        for kind, one in events:
            self.log.append((turn, kind.name, one.request_id))
            if kind is EventKind.PROMPT_COMPUTED:
                assert one.computed_tokens + one.cached_tokens + one.received_tokens == one.prompt_tokens
                assert one.computed_tokens >= 1
            if kind is EventKind.FINISHED:
                assert one.generated == one.max_tokens

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.scheduler.pool
        live = [one for one in self.requests if scheduler.get(one.request_id) is one]
        assert pool.used == len({block for one in live for block in one.blocks})
        assert pool.used + pool.free == pool.total
        for one in live:
            assert len(set(one.blocks)) == len(one.blocks)
            if one.stage is Stage.DECODING:
                reach = one.done + scheduler.generated(one) - one.generated
                assert len(one.blocks) * scheduler.profile.block_tokens - reach >= 0
        load = scheduler.load()
        assert load.context_tokens == sum(one.prompt_tokens + scheduler.generated(one) for one in scheduler.decoding())
        assert load.running + load.waiting + load.held == len(live)
        assert load.waiting_tokens == sum(one.tokens - one.done for one in live if one.stage in _TO_COMPUTE)
        stored, removed = scheduler.drain_cache_events()
        assert self.told.isdisjoint(stored)
        assert self.told.issuperset(removed)
        self.told = (self.told | set(stored)) - set(removed)
        assert len(self.told) == pool.cached


_TO_COMPUTE = (Stage.EXPECTING, Stage.WAITING, Stage.RECEIVING, Stage.PREFILLING)


@settings(max_examples=150, deadline=None)
@given(PROFILES, CASES)
def test_whatever_comes_nothing_leaks_nothing_starves_and_every_token_counts_once(
    chosen: Profile, cases: list[Case]
) -> None:
    load = Load(chosen, cases)
    load.play()
    assert load.scheduler.pool.used == 0
    ended = {name for _, kind, name in load.log if kind in ("FINISHED", "PROMPT_COMPUTED")}
    assert ended.issuperset(str(n) for n, case in enumerate(cases) if case.fate != "abort")


@settings(max_examples=30, deadline=None)
@given(PROFILES, CASES)
def test_the_same_load_always_runs_the_same_way(chosen: Profile, cases: list[Case]) -> None:
    once, again = Load(chosen, cases), Load(chosen, cases)
    once.play()
    again.play()
    assert once.log == again.log


@settings(max_examples=60, deadline=None)
@given(PROFILES, CASES)
def test_ticks_in_one_step_come_to_the_same_as_one_by_one(chosen: Profile, cases: list[Case]) -> None:
    logs = []
    for play in (run, merged):
        scheduler = Scheduler(chosen)
        for number, case in enumerate(cases):
            scheduler.add(request(str(number), case.prompt, case.max_tokens + 1, case.family))
        logs.append([(round(at_s, 9), event.kind, event.request.request_id) for at_s, event in play(scheduler)])
    alone = [entry for entry in logs[0] if entry[1] is not EventKind.PREEMPTED]
    assert [entry for entry in logs[1] if entry[1] is not EventKind.PREEMPTED] == alone


def test_a_step_of_many_ticks_ends_where_something_changes_or_comes() -> None:
    scheduler = Scheduler(PROFILE)
    scheduler.add(request("a", 5, max_tokens=9))
    one_step(scheduler)
    step = scheduler.plan(0.0, most_ticks=100)
    assert step is not None
    assert step.ticks == 8  # until its end; the blocks that it needs until then are free
    assert step.seconds == pytest.approx(8 * 0.005)
    assert scheduler.catch_up(0.004) == 0
    assert scheduler.shorten(step, 0.006) == pytest.approx(0.010)
    assert step.ticks == 1
    scheduler.finish(step, 0.010)
    asked = scheduler.get("a")
    assert asked is not None
    assert scheduler.generated(asked) == 3
