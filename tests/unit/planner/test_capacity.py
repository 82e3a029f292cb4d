"""The performance model against queues that are really simulated, and against what must hold of any."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.capacity import NEVER_S, DecodeBatch, Pair, PrefillQueue
from planner.choose import PoolAsk, best_within, cheapest, choose
from planner.demand import Demand, together
from planner.objectives import Bounds, Objective
from planner.pool_model import Asked, PoolModel, least
from planner.scaling import Counts
from tests.unit.planner.plant import packaged

PROFILE = packaged()
PAIR = Pair.of(PROFILE)
SLO = Objective(ttft_s=2.0, itl_s=0.04, percentile=99.0)

DEMANDS = st.builds(
    Demand,
    requests_per_s=st.floats(0.01, 60.0),
    input_tokens=st.floats(10.0, 8000.0),
    output_tokens=st.floats(1.0, 1500.0),
    input_variation=st.floats(0.0, 2.0),
    hit_rate=st.floats(0.0, 0.9),
    burstiness=st.floats(1.0, 6.0),
)


def queued(demand: Demand, workers: int, requests: int = 60_000) -> list[float]:
    """Waits and compute times of a real queue: one line, Poisson arrivals, lognormal prompts."""
    draw, free, now_s = random.Random(1), [0.0] * workers, 0.0
    spread = math.sqrt(math.log1p(demand.input_variation**2))
    ttft = []
    for _ in range(requests):
        now_s += draw.expovariate(demand.requests_per_s)
        length = demand.input_tokens * math.exp(draw.gauss(0.0, spread) - spread**2 / 2)
        begin_s = max(now_s, heapq.heappop(free))
        end_s = begin_s + PAIR.prefill.prefill_s(length)
        heapq.heappush(free, end_s)
        ttft.append(end_s - now_s)
    return sorted(ttft)


@pytest.mark.parametrize(("rate", "workers"), [(4.0, 1), (5.5, 1), (12.0, 2), (26.0, 4)])
@pytest.mark.parametrize("variation", [0.5, 1.0])
def test_shares_in_time_are_those_of_a_real_queue(rate: float, workers: int, variation: float) -> None:
    demand = Demand(rate, 2000.0, 1.0, variation)
    real, model = queued(demand, workers), PrefillQueue(demand, PAIR.prefill)
    for limit_s in (0.5, 1.0, 2.0):
        within = sum(one <= limit_s for one in real) / len(real)
        assert model.within(workers, limit_s) == pytest.approx(within, abs=0.05)
    p95_s = real[int(0.95 * len(real))]
    assert model.percentile_s(workers, 95.0) == pytest.approx(p95_s, rel=0.35)


def test_decode_batches_follow_little() -> None:
    demand = Demand(4.0, 1000.0, 250.0)
    batch = DecodeBatch(demand, PAIR.decode)
    running = batch.running(2)
    assert running is not None
    assert running == pytest.approx(4.0 / 2 * 250.0 * batch.step_s(running), rel=1e-3)
    limit_s = (batch.step_s(1.0) + batch.step_s(batch.most_running)) / 2.0
    assert batch.step_s(batch.fitting(limit_s)) == pytest.approx(limit_s, rel=1e-3)
    assert batch.fitting(1.0) == batch.most_running


def test_long_contexts_are_limited_by_kv_blocks_and_not_by_their_steps() -> None:
    many = Demand(3.0, 20_000.0, 400.0)
    batch = DecodeBatch(many, PAIR.decode)
    assert batch.most_running < 10
    assert batch.running(1) is None, "more come than fit"
    pool = PoolModel(PAIR, [Asked(many, Objective(60.0, 10.0))])
    assert pool.needed(Counts(1, 1), Counts(64, 64)).decode > 3


def test_a_queue_that_only_grows_has_no_end_and_the_more_workers_the_better() -> None:
    queue = PrefillQueue(Demand(100.0, 2000.0, 1.0), PAIR.prefill)
    assert queue.percentile_s(2, 99.0) == NEVER_S
    assert 0.0 < queue.within(2, 2.0) < queue.within(4, 2.0) < 0.06


@settings(max_examples=60, deadline=None)
@given(demand=DEMANDS, workers=st.integers(1, 40))
def test_more_workers_never_do_worse_and_more_load_never_better(demand: Demand, workers: int) -> None:
    def shares(one: Demand, count: int) -> tuple[float, float]:
        pool = PoolModel(PAIR, [Asked(one, SLO)]).predicted(Counts(count, count))
        return pool.ttft_share, pool.itl_share

    few, many, loaded = shares(demand, workers), shares(demand, workers + 1), shares(demand.scaled(1.5), workers)
    assert all(0.0 <= share <= 1.0 for share in (*few, *many, *loaded))
    assert all(more >= less - 2e-3 for less, more in zip(few, many, strict=True))
    assert all(more <= less + 2e-3 for less, more in zip(few, loaded, strict=True))


@settings(max_examples=40, deadline=None)
@given(demand=DEMANDS)
def test_the_cheapest_counts_meet_what_one_fewer_does_not(demand: Demand) -> None:
    pool = PoolModel(PAIR, [Asked(demand, SLO)])
    found = pool.needed(Counts(1, 1), Counts(4000, 4000))
    assert pool.prefill_meets(found.prefill)
    assert pool.decode_meets(found.decode)
    assert found.prefill == 1 or not pool.prefill_meets(found.prefill - 1)
    assert found.decode == 1 or not pool.decode_meets(found.decode - 1)


def ask(model: str, rate: float, **changes: object) -> PoolAsk:
    pool = PoolModel(PAIR, [Asked(Demand(rate, 1200.0, 220.0), SLO)] if rate else [])
    return PoolAsk(model, pool, Counts(1, 1), **{"bounds": Bounds()} | changes)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    rates=st.lists(st.floats(0.0, 80.0), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([1.0, 2.0]), min_size=4, max_size=4),
    budget=st.integers(1, 40),
)
def test_all_models_together_never_take_more_than_the_budget(
    rates: list[float], weights: list[float], budget: int
) -> None:
    asks = [ask(f"m{n}", rate, weight=weight) for n, (rate, weight) in enumerate(zip(rates, weights, strict=False))]
    chosen = choose(asks, budget)
    assert sum(one.gpus(chosen[one.model]) for one in asks) <= budget


def test_the_weightier_model_goes_first() -> None:
    both = choose([ask("light", 30.0), ask("heavy", 30.0, weight=2.0)], 9)
    heavy = ask("heavy", 30.0)
    assert both["heavy"] == cheapest(heavy, 64)
    assert both["light"].total == 9 - both["heavy"].total


def test_with_too_few_gpus_the_split_serves_most() -> None:
    one = ask("m", 60.0)
    best = best_within(one, 8)
    assert best.total == 8
    every = {Counts(prefill, 8 - prefill) for prefill in range(1, 8)}
    assert one.pool.goodput(best) == max(map(one.pool.goodput, every))


def test_batch_work_takes_what_is_left_and_gives_it_back() -> None:
    work = Demand(50.0, 1200.0, 220.0)

    def chosen(rate: float) -> tuple[Counts, Counts]:
        served = ask("m", rate)
        batch = PoolModel(PAIR, [*served.pool.asked, Asked(work, Objective(3600.0, 10.0, 50.0))])
        idle = ask("night", 0.0, batch=batch)
        counts = choose([served, idle], 10)
        return counts["m"], counts["night"]

    quiet, busy = chosen(2.0), chosen(30.0)
    assert quiet[0] == Counts(1, 1)
    assert quiet[1].total == 8
    assert busy[0] == cheapest(ask("m", 30.0), 64)
    assert busy[1].total == 10 - busy[0].total


def test_an_aggregated_pool_is_chosen_where_it_is_cheaper() -> None:
    small = ask("m", 1.0, bounds=Bounds(allow_aggregated=True))
    small = PoolAsk("m", small.pool, Counts(0, 1), small.bounds)
    assert cheapest(small, 8) == Counts(0, 1)


def test_several_classes_are_one_stream() -> None:
    both = together([Demand(1.0, 1000.0, 100.0, 0.0), Demand(3.0, 2000.0, 300.0, 0.0)])
    assert both.requests_per_s == 4.0
    assert both.input_tokens == 1750.0
    assert both.output_tokens == 250.0
    assert both.input_variation == pytest.approx(433.0 / 1750.0, rel=0.01)


def test_the_lax_class_waits_behind_the_strict_one_only() -> None:
    strict = Asked(Demand(5.0, 1200.0, 100.0), Objective(1.0, 0.05))
    lax = Asked(Demand(12.0, 1200.0, 100.0), Objective(30.0, 0.05))
    alone = PoolModel(PAIR, [strict]).needed(Counts(1, 1), Counts(64, 64))
    both = PoolModel(PAIR, [lax, strict]).needed(Counts(1, 1), Counts(64, 64))
    as_strict = PoolModel(PAIR, [strict, Asked(lax.demand, strict.objective)]).needed(Counts(1, 1), Counts(64, 64))
    assert alone.prefill <= both.prefill <= as_strict.prefill


@given(border=st.integers(0, 500), low=st.integers(0, 100), high=st.integers(0, 500))
def test_the_least_number_is_found(border: int, low: int, high: int) -> None:
    found = least(lambda number: number >= border, low, high)
    assert found == (low if high <= low else min(max(border, low), high))


def test_a_search_asks_about_few_counts() -> None:
    asked: list[int] = []
    least(lambda number: asked.append(number) or number >= 700, 1, 4096)  # type: ignore[func-returns-value]
    assert len(asked) < 25
