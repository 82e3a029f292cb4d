"""Published results about routing and caches, replayed: rows 2, 3 and the routing part of 8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import msgspec
import numpy as np

from benchmarks.planner_loads import MOONCAKE
from benchmarks.router_policies import PROFILES
from frontend.router.ask import Ask
from frontend.router.choice import Router, check
from frontend.router.fleet import Fleet
from frontend.router.policies import scored
from frontend.router.route import Route
from simulator import traces
from simulator.frontend import Policy
from simulator.journey import Journey
from simulator.run import coarse
from simulator.serving import fixed_cluster
from slipstream.performance import Predictor, Profile, read_profile

PROFILE = "qwen3-32b-h200-tp4"
SPLIT = (8, 8)
REQUESTS = 4000
SPEED = 6.0
PUBLISHED_TTFT_S = {"random": 19.65, "load": 5.27, "local cache": 3.58, "global cache": 3.07}

CACHE_TOKENS = 3_000_000
CACHE_SPLIT = (10, 2)
PUBLISHED_HITS, PUBLISHED_PREFILL = 2.22, 0.76


class Lot:
    """Any worker of each role, by lot."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def choose(self, ask: Ask, fleet: Fleet, now_s: float) -> Route:
        check(ask, fleet)
        return scored(
            ask, fleet, lambda pool: self._random.random(len(pool)), lambda pool: self._random.random(len(pool)), "lot"
        )


@dataclass(frozen=True, slots=True)
class Routed:
    """What a policy came to on Mooncake's conversation trace. `published_s` is the mean TTFT, where there is one."""

    policy: str
    ttft_mean_s: float
    e2e_mean_s: float
    hit_rate: float
    published_s: float | None


@dataclass(frozen=True, slots=True)
class Caches:
    """One kind of cache: the share of prompt tokens that it spared, and the prefill workers' time for the rest."""

    kind: str
    hit_rate: float
    prefill_s: float


_POLICIES: dict[str, tuple[Callable[[], Policy], bool]] = {
    "random": (Lot, False),
    "load": (lambda: Router("load"), False),
    "local cache": (lambda: Router("kv", always_hand_off=True), False),
    "global cache": (lambda: Router("kv", always_hand_off=True), True),
}
"""With whether prefill fetches what another worker has."""


def routed(policy: str, speed: float = SPEED, requests: int = REQUESTS) -> Routed:
    """Row 2: one policy, every prompt computed by a prefill worker."""
    profile = coarse(read_profile(PROFILES / f"{PROFILE}.json"), traces.MOONCAKE_BLOCK_TOKENS)
    journeys = _serve(profile, SPLIT, policy, _arrivals()[:requests], speed)
    done = [one for one in journeys if one.ended_s >= 0 and not one.error]
    prompt = sum(one.arrival.input_tokens for one in done)
    return Routed(
        policy,
        float(np.mean([one.ttft_s for one in done])),
        float(np.mean([one.e2e_s for one in done])),
        sum(one.cached_tokens + one.fetched_tokens for one in done) / prompt,
        PUBLISHED_TTFT_S.get(policy),
    )


def caches() -> tuple[Caches, Caches]:
    """Row 3: caches of three million tokens for each of ten prefill workers, one token of answer: local, then global.

    Local: every worker has its own and requests go where least waits. Global: what one has, all can fetch.
    """
    profile = read_profile(PROFILES / f"{PROFILE}.json")
    sized = coarse(profile, traces.MOONCAKE_BLOCK_TOKENS)
    sized = msgspec.structs.replace(sized, blocks=CACHE_TOKENS // traces.MOONCAKE_BLOCK_TOKENS)
    arrivals = [replace(one, output_tokens=1) for one in _arrivals()]
    found = []
    for kind, policy in (("local", "load"), ("global", "global cache")):
        journeys = _serve(sized, CACHE_SPLIT, policy, arrivals, 1.0)
        done = [one for one in journeys if one.ended_s >= 0 and not one.error]
        spared = [one.cached_tokens + one.fetched_tokens for one in done]
        predict = Predictor(sized)
        seconds = sum(
            predict.prefill_s(max(1, one.arrival.input_tokens - known), known)
            for one, known in zip(done, spared, strict=True)
        )
        found.append(Caches(kind, sum(spared) / sum(one.arrival.input_tokens for one in done), seconds))
    return found[0], found[1]


@lru_cache(maxsize=1)
def _arrivals() -> list[traces.Arrival]:
    return traces.read_mooncake(MOONCAKE)


def _serve(
    profile: Profile, split: tuple[int, int], policy: str, arrivals: list[traces.Arrival], speed: float
) -> list[Journey]:
    make, fetching = _POLICIES[policy]
    cluster, kept = fixed_cluster((profile, profile), split, [make()], write_back=fetching)
    cluster.run(traces.at_speed(arrivals, speed))
    return kept.journeys
