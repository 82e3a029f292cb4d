"""Predictions are corrected by what happens, slowly enough for one bad second and fast enough for a wrong profile."""

from __future__ import annotations

import math

import pytest

from frontend.router import Ask, Fleet, Route, Router
from frontend.router.learning import AnswerLengths, Outcome, learn
from frontend.router.speeds import COLD_SAMPLES, PROFILED_BOUND, UNPROFILED_BOUND, Correction
from tests.unit.frontend.router.workers import DECODE, PREFILL, fast_worker, fleet_of, worker

ASK = Ask("m", 1000, 100)


def test_the_first_requests_of_a_life_teach_nothing() -> None:
    correction = Correction(PROFILED_BOUND)
    for _ in range(COLD_SAMPLES):
        correction.note(60.0, 0.1)
    assert correction.factor == 1.0


def test_a_correction_comes_to_the_ratio_that_is_seen_and_stays_there_when_one_sample_is_off() -> None:
    correction = Correction(UNPROFILED_BOUND)
    for _ in range(40):
        correction.note(3.0, 0.1)
    assert correction.factor == pytest.approx(30)
    correction.note(3000.0, 0.1)
    assert correction.factor < 30 * 1.16


def test_experience_never_leads_further_from_a_profile_than_eightfold() -> None:
    correction = Correction(PROFILED_BOUND)
    for _ in range(200):
        correction.note(100.0, 0.1)
    assert correction.factor == pytest.approx(8)


def seen(fleet: Fleet, route: Route, slower: float) -> None:
    """The route's prediction came true but for a factor."""
    assert route.predicted is not None
    predicted = route.predicted
    prefill_s = (predicted.queue_s + predicted.prefill_s) * slower
    learn(
        fleet,
        route,
        Outcome(
            prompt_tokens=1000,
            prefill_s=prefill_s,
            computed_tokens=predicted.new_tokens,
            ttft_s=prefill_s + predicted.transfer_s + predicted.itl_s,
            itl_s=predicted.itl_s,
            tokens=100,
        ),
    )


def test_a_worker_that_is_slower_than_its_profile_gets_less_and_the_others_are_not_blamed() -> None:
    fleet = fleet_of([*(fast_worker(f"p{index}", PREFILL) for index in range(2)), fast_worker("d", DECODE)])
    chosen = []
    for _ in range(60):
        route = Router(always_hand_off=True).choose(ASK, fleet, 0.0)
        assert route.prefill is not None
        chosen.append(route.prefill.worker_id)
        actual = 3.0 if route.prefill.worker_id == chosen[0] else 1.0
        factor = fleet.get(route.prefill.worker_id)
        assert factor is not None
        seen(fleet, route, actual / factor.prefill.factor)
    assert set(chosen[-40:]) == {"p1" if chosen[0] == "p0" else "p0"}
    other = fleet.get(chosen[-1])
    assert other is not None
    assert other.prefill.factor == pytest.approx(1.0, abs=0.01)


def test_a_wrong_idea_of_the_cache_is_no_wrong_idea_of_the_speed() -> None:
    fleet = fleet_of([fast_worker("p", PREFILL), fast_worker("d", DECODE)])
    ask = Ask("m", 1000, 100, known={"p": 900})
    for _ in range(20):
        route = Router(always_hand_off=True).choose(ask, fleet, 0.0)
        assert route.predicted is not None
        learn(fleet, route, Outcome(1000, prefill_s=0.101, computed_tokens=1000, ttft_s=0.12, tokens=1))
    one = fleet.get("p")
    assert one is not None
    assert one.prefill.factor == pytest.approx(1.0, abs=0.01)


def test_without_a_profile_what_is_seen_decides_alone() -> None:
    fleet = fleet_of([worker("p", PREFILL, max_model_len=100_000), worker("d", DECODE, max_model_len=100_000)])
    for _ in range(20):
        route = Router(always_hand_off=True).choose(ASK, fleet, 0.0)
        learn(fleet, route, Outcome(1000, prefill_s=12.0, computed_tokens=1000, ttft_s=12.5, itl_s=0.2, tokens=50))
    route = Router(always_hand_off=True).choose(ASK, fleet, 0.0)
    assert route.predicted is not None
    assert route.predicted.prefill_s == pytest.approx(12.0, rel=0.02)
    assert route.predicted.itl_s == pytest.approx(0.2, rel=0.02)
    assert route.predicted.transfer_s == pytest.approx(0.3, rel=0.1)


def test_a_new_worker_begins_with_what_its_like_have_shown() -> None:
    fleet = fleet_of([worker("p0", PREFILL), worker("d", DECODE)])
    first = fleet.get("p0")
    assert first is not None
    for _ in range(10):
        first.prefill.note(5.0, 1.0)
    second = fleet.put(worker("p1", PREFILL).record)
    assert second.prefill.log_factor == pytest.approx(math.log(5))


def test_a_worker_that_has_shown_nothing_is_taken_to_be_as_fast_as_the_others_of_its_kind() -> None:
    """Else the first that proves faster than expected keeps all prompts, however many wait there."""
    fleet = fleet_of(
        [*(worker(f"p{index}", PREFILL, max_model_len=100_000) for index in range(2)), worker("d", DECODE)]
    )
    for _ in range(10):
        route = Router(always_hand_off=True).choose(ASK, fleet, 0.0)
        learn(fleet, route, Outcome(1000, prefill_s=0.02, computed_tokens=1000, ttft_s=0.03, tokens=1))
    chosen = []
    for _ in range(8):
        route = Router(always_hand_off=True).choose(ASK, fleet, 0.0)
        assert route.prefill is not None
        chosen.append(route.prefill.worker_id)
        fleet.begin(chosen[-1], 1000, 1000, 0.0)
    assert chosen.count("p0") == chosen.count("p1") == 4


def test_a_worker_that_takes_another_role_is_taken_to_be_as_fast_there_as_the_others() -> None:
    fleet = fleet_of([worker("p", PREFILL), worker("w", DECODE)])
    first, flipped = fleet.get("p"), fleet.get("w")
    assert first is not None
    assert flipped is not None
    for _ in range(10):
        first.prefill.note(0.1, 1.0)
        flipped.step.note(0.5, 1.0)
    fleet.put(worker("w", PREFILL).record)
    assert flipped.prefill.log_factor == pytest.approx(math.log(0.1))
    assert flipped.step.log_factor == pytest.approx(math.log(0.5))


def test_answers_are_as_long_as_they_have_been() -> None:
    lengths = AnswerLengths()
    assert lengths.of("m") == 0
    lengths.note("m", 100)
    lengths.note("m", 200)
    assert 100 < lengths.of("m") < 110
