"""Forecasts of a rate: noise, jumps, ramps, hours of the day."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.demand import DemandSeen
from planner.forecast import Forecaster
from planner.observation import Traffic

STEP_S = 5.0


def poisson(draw: random.Random, mean: float) -> int:
    count, left = 0, mean
    while (left := left - draw.expovariate(1.0)) > 0.0:
        count += 1
    return count


def fed(rates: list[float], *, noise: random.Random | None = None, step_s: float = STEP_S) -> Forecaster:
    one = Forecaster()
    for number, rate in enumerate(rates):
        seen = poisson(noise, rate * step_s) / step_s if noise is not None else rate
        one.add(seen, step_s, (number + 1) * step_s)
    return one


def test_noise_alone_moves_the_forecast_little() -> None:
    draw, one = random.Random(1), Forecaster()
    uppers = []
    for number in range(900):
        one.add(poisson(draw, 20.0 * STEP_S) / STEP_S, STEP_S, number * STEP_S)
        if number > 60:
            uppers.append(one.forecast(120.0).upper)
    assert min(uppers) > 19.0
    assert max(uppers) < 24.0


def test_a_jump_is_believed_within_three_looks() -> None:
    draw = random.Random(2)
    before = fed([4.0] * 200, noise=draw)
    for number in range(3):
        before.add(poisson(draw, 16.0 * STEP_S) / STEP_S, STEP_S, 1000.0 + number * STEP_S)
    assert 9.0 < before.forecast(60.0).upper < 20.0
    for number in range(40):
        before.add(poisson(draw, 16.0 * STEP_S) / STEP_S, STEP_S, 1015.0 + number * STEP_S)
    assert 15.0 < before.forecast(60.0).mean < 20.0, "and not followed beyond where it ended"


def test_a_ramp_is_seen_ahead() -> None:
    ramp = fed([5.0 + 0.05 * number * STEP_S for number in range(120)])
    now = 5.0 + 0.05 * 120 * STEP_S
    ahead = ramp.forecast(60.0).mean
    assert now < ahead < now + 0.05 * 90.0


def test_the_bound_keeps_more_distance_on_a_load_that_is_hard_to_foretell() -> None:
    draw = random.Random(4)
    steady = fed([20.0] * 720, noise=draw).forecast(120.0)
    levels = [draw.choice([10.0, 20.0, 30.0]) for _ in range(40)]
    restless = fed([levels[number // 18] for number in range(720)], noise=draw).forecast(120.0)
    assert steady.upper / steady.mean < 1.08
    assert restless.upper / restless.mean > 1.15


def test_what_falls_is_not_forecast_below_what_is_there_now() -> None:
    falling = fed([40.0 - 0.05 * number * STEP_S for number in range(120)])
    one = falling.forecast(120.0)
    assert one.mean >= one.level


def test_the_hour_of_the_day_is_known_from_the_second_day_on() -> None:
    def rate(at_s: float) -> float:
        return 10.0 if 9.0 <= at_s % 86400.0 / 3600.0 < 18.0 else 2.0

    step_s = 60.0
    one, day = Forecaster(), [rate(number * step_s) for number in range(1440)]
    for number in range(1440 + 9 * 60 - 20):
        one.add(day[number % 1440], step_s, (number + 1) * step_s)
        if number == 9 * 60 - 20:
            assert one.forecast(1800.0).mean < 3.0, "on the first day nobody can know"
    assert one.forecast(1800.0).mean > 6.0, "half an hour before the morning"


def test_the_first_samples_are_no_certainty() -> None:
    first = fed([3.0])
    assert first.forecast(60.0).upper > 3.5
    assert Forecaster().forecast(60.0).upper == 0.0


@given(st.lists(st.floats(0.0, 1e5), min_size=1, max_size=60), st.floats(0.0, 3600.0))
def test_the_bound_is_a_bound_and_finite(rates: list[float], horizon_s: float) -> None:
    one = fed(rates).forecast(horizon_s)
    assert 0.0 <= one.mean <= one.upper < math.inf


def test_lengths_their_variation_and_bursts_are_learned_from_sums() -> None:
    draw, seen = random.Random(3), DemandSeen()
    spread = math.sqrt(math.log(2.0))
    for number in range(2000):
        burst = 3 if number // 4 % 3 == 0 else 0
        lengths = [2000.0 * math.exp(draw.gauss(0.0, spread) - spread**2 / 2) for _ in range(burst * 5)]
        one = Traffic(len(lengths), input_tokens=int(sum(lengths)), finished=len(lengths))
        one.output_tokens = 150 * len(lengths)
        one.computed_prompt_tokens, one.cached_tokens = 700, 300
        seen.add(one, STEP_S, number * STEP_S)
    demand = seen.demand(1.0)
    assert demand.input_tokens == pytest.approx(2000.0, rel=0.1)
    assert demand.input_variation == pytest.approx(1.0, abs=0.35)
    assert demand.output_tokens == pytest.approx(150.0, rel=0.1)
    assert demand.hit_rate == pytest.approx(0.3)
    assert demand.burstiness > 3.0
