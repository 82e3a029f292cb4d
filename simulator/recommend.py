"""How many GPUs a load needs to meet its SLO, and whether disaggregation is worth it for it at all.

For each kind of worker (a profile: a GPU and a tensor parallelism) the smallest pool that meets the objective is
searched twice: with prefill workers beside decode workers, and aggregated, where every worker does both. The planner's
model says where to begin; what counts is only what the simulator has shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from planner.capacity import Pair
from planner.demand import Demand
from planner.objectives import Objective
from planner.pool_model import Asked, PoolModel, least
from planner.scaling import Counts
from simulator.chosen_load import Load, LoadSummary, summary_of
from simulator.pool_trials import Kind, Pool, Trials, smallest
from slipstream.errors import ConfigError
from slipstream.performance import Profile

KINDS: tuple[Kind, Kind] = ("disaggregated", "aggregated")
MOST_WORKERS = 1024
MARGIN_STEPS = 5
MOST_MARGIN = 4.0
"""What bears nearly so much is not asked for more."""
SAME_MARGIN = 1.05
"""Two pools of as many GPUs whose margins differ by less are equally good."""


class Recommendation(msgspec.Struct, frozen=True):
    """The answer.

    Attributes:
        about: the load, in a few words.
        disaggregated, aggregated: the best of each; where none meets the objective the nearest that was tried.
        better: what to run; `none` where nothing met the objective within the GPUs.
        because: why, in a sentence or two.
        best_of_each: for each profile and kind that could compete with the best.
        simulations: that it took.
    """

    about: str
    load: LoadSummary
    objective: Objective
    disaggregated: Pool | None
    aggregated: Pool | None
    better: Literal["disaggregated", "aggregated", "none"]
    because: str
    best_of_each: list[Pool]
    simulations: int


def recommend(
    load: Load,
    objective: Objective,
    profiles: Sequence[Profile],
    *,
    max_gpus: int,
    seed: int = 0,
    said: Callable[[Pool], None] = lambda pool: None,
) -> Recommendation:
    """Search, and say which is better.

    Args:
        profiles: kinds of workers to choose from; both roles have the same.
        said: told of each pool as it was simulated.

    Raises:
        ConfigError: there is no profile, or the load holds no requests.
    """
    if not profiles:
        raise ConfigError("recommend needs a profile", param="profile")
    summary = summary_of(load.begin(), load.block_tokens)
    searches = [_Search(profile, load, summary, objective, seed, said) for profile in profiles]
    disaggregated, aggregated = (_best(searches, kind, max_gpus) for kind in KINDS)
    better, because = _verdict(disaggregated, aggregated, summary, max_gpus)
    each = [pool for search in searches for kind in KINDS if (pool := search.trials.best(kind)) is not None]
    return Recommendation(
        about=load.about,
        load=summary,
        objective=objective,
        disaggregated=disaggregated,
        aggregated=aggregated,
        better=better,
        because=because,
        best_of_each=sorted(each, key=lambda pool: (not pool.meets, pool.gpus, pool.profile, pool.kind)),
        simulations=sum(search.trials.count for search in searches),
    )


class _Search:
    """One kind of worker."""

    def __init__(
        self,
        profile: Profile,
        load: Load,
        summary: LoadSummary,
        objective: Objective,
        seed: int,
        said: Callable[[Pool], None],
    ) -> None:
        self.trials = Trials(profile, load, summary.duration_s, objective, seed, said)
        demand = Demand(
            summary.rate_per_s,
            summary.input_tokens,
            summary.output_tokens,
            summary.input_variation,
            summary.hit_rate,
        )
        model = PoolModel(Pair.of(profile), [Asked(demand, objective)])
        most = Counts(MOST_WORKERS, MOST_WORKERS)
        self.expected: dict[Kind, Counts] = {
            "disaggregated": model.needed(Counts(1, 1), most),
            "aggregated": Counts(0, least(model.aggregated_meets, 1, MOST_WORKERS)),
        }

    def expected_gpus(self, kind: Kind) -> int:
        """By the planner's model."""
        return self.expected[kind].total * self.trials.gpus

    def smallest_pool(self, kind: Kind, max_gpus: int) -> Pool | None:
        """That meets the objective, else the nearest that was tried; None: no pool has so few GPUs."""
        most, expected = max_gpus // self.trials.gpus, self.expected[kind]
        if kind == "aggregated":
            smallest(lambda workers: self.trials.pool(Counts(0, workers)).meets, expected.total, 1, most)
            return self.trials.best(kind)
        share = expected.prefill / expected.total

        def will_do(workers: int) -> bool:
            nonlocal share
            pool = self.trials.split(workers, round(share * workers))
            share = pool.prefill / workers
            return pool.meets

        smallest(will_do, expected.total, 2, most)
        return self.trials.best(kind)

    def with_margin(self, pool: Pool) -> Pool:
        """How much more it bears, to a twentieth."""
        low, high = 1.0, MOST_MARGIN
        for _ in range(MARGIN_STEPS):
            middle = math.sqrt(low * high)
            if self.trials.bears(pool.counts, middle):
                low = middle
            else:
                high = middle
        return msgspec.structs.replace(pool, margin=low)


def _best(searches: Sequence[_Search], kind: Kind, max_gpus: int) -> Pool | None:
    """Over all kinds of workers. What cannot be smaller than the best so far is not searched to its end."""
    best: tuple[Pool, _Search] | None = None
    for search in sorted(searches, key=lambda each: each.expected_gpus(kind)):
        within = best[0].gpus if best is not None and best[0].meets else max_gpus
        found = search.smallest_pool(kind, within)
        if found is not None and (best is None or _order(found) < _order(best[0])):
            best = found, search
    if best is None:
        return None
    pool, search = best
    return search.with_margin(pool) if pool.meets else pool


def _order(pool: Pool) -> tuple[bool, int, float]:
    """The better first: what meets the objective, with fewer GPUs; then what comes nearest to it."""
    return not pool.meets, pool.gpus if pool.meets else 0, -min(pool.ttft_attainment, pool.itl_attainment)


def _verdict(
    apart: Pool | None, together: Pool | None, load: LoadSummary, max_gpus: int
) -> tuple[Literal["disaggregated", "aggregated", "none"], str]:
    """Which, and why."""
    met = [pool for pool in (apart, together) if pool is not None and pool.meets]
    if not met:
        tried = [pool for pool in (apart, together) if pool is not None]
        if not tried:
            return "none", f"no worker of these profiles fits into {max_gpus} GPUs"
        nearest = min(tried, key=_order)
        return "none", (
            f"nothing within {max_gpus} GPUs meets the objective; {_named(nearest)} comes nearest, with "
            f"{nearest.ttft_attainment:.1%} of the first tokens and {nearest.itl_attainment:.1%} of the answers in time"
        )
    if len(met) == 1:
        return met[0].kind, f"only {_named(met[0])} meets the objective within {max_gpus} GPUs"
    assert apart is not None
    assert together is not None
    if apart.gpus != together.gpus:
        small, large = sorted((apart, together), key=lambda pool: pool.gpus)
        gpus = "1 GPU" if small.gpus == 1 else f"{small.gpus} GPUs"
        return small.kind, f"{_named(small)} does with {gpus}, {_named(large)} needs {large.gpus}"
    bears = " and ".join(
        f"{_named(pool)} bears up to {pool.margin * load.rate_per_s:.3g} requests/s" for pool in (apart, together)
    )
    said = f"both need {apart.gpus} GPUs; {bears}"
    if apart.margin > together.margin * SAME_MARGIN:
        return "disaggregated", said
    if together.margin > apart.margin * SAME_MARGIN:
        return "aggregated", said
    return "aggregated", f"{said}: no difference, and an aggregated pool is simpler"


def _named(pool: Pool) -> str:
    return f"{pool.workers} x {pool.profile}"
