"""Overload in virtual time: the live admission and router over the simulated engines' scheduler, without any noise.

Clients that are refused come back when they were told to, which the simulator's own loads do not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from benchmarks.goodput import ANSWERED, FAILED, REFUSED, Result, Try, result
from benchmarks.offered_load import LENGTHS, PATIENCE, WAITS, Lengths, Patience, Source, draw
from frontend.router.choice import Router
from simulator.run import profile_named
from simulator.serving import ServedModel, SimulatedCluster
from simulator.underway import Underway
from slipstream.settings import AdmissionSettings

_REQUEST_TIMEOUT_S = 600.0
_CAPACITY_STEP = 1.08
_GROWS = 1.01
"""Goodput grows while a step of the ramp adds more than this."""

KEEPS_UP = 0.95
"""A step at which so many keep their SLO is not the last one, whatever chance did to its goodput."""


@dataclass(frozen=True, slots=True)
class World:
    """A cluster, and how long each load is: only what comes after `warm_s` counts."""

    profile: str = "llama-3.1-70b-h200-tp1"
    prefill: int = 8
    decode: int = 8
    seconds: float = 300.0
    warm_s: float = 100.0
    seed: int = 1
    lengths: Lengths = LENGTHS
    patience: Patience = PATIENCE
    admission: AdmissionSettings = field(default_factory=lambda: AdmissionSettings(**WAITS))


class Clients:
    """A cluster's watcher that writes down every try, and sends refused clients back in time."""

    def __init__(self, cluster: SimulatedCluster, world: World) -> None:
        self._cluster = cluster
        self._patience = world.patience
        self._chance = random.Random(world.seed)
        self.tries: list[Try] = []

    def arrived(self, under: Underway) -> None: ...
    def computed(self, under: Underway) -> None: ...
    def first_token(self, under: Underway) -> None: ...

    def refused(self, under: Underway) -> None:
        journey, now_s = under.journey, self._cluster.loop.now_s
        one = self._note(under, REFUSED)
        if journey.retry_after_s > self._patience.longest_s or one.number + 1 >= self._patience.tries:
            return
        # Retry-After is in whole seconds.
        wait_s = -(-journey.retry_after_s // 1) + self._chance.uniform(0.0, self._patience.late_s)
        self._cluster.expect(replace(journey.arrival, at_s=now_s + wait_s, session=f"{one.number + 1}"))

    def ended(self, under: Underway) -> None:
        self._note(under, FAILED if under.journey.error else ANSWERED)

    def _note(self, under: Underway, outcome: str) -> Try:
        journey, arrival = under.journey, under.journey.arrival
        one = Try(
            arrival.request_id,
            int(arrival.session or 0),
            arrival.service_class,
            arrival.tenant,
            arrival.at_s,
            self._cluster.loop.now_s,
            outcome,
            journey.ttft_s if outcome == ANSWERED else 0.0,
            journey.tpot_s if outcome == ANSWERED else 0.0,
            arrival.output_tokens,
            journey.error,
            -(-journey.retry_after_s // 1),
        )
        self.tries.append(one)
        return one


def replay(
    world: World, rate_per_s: float, times_capacity: float = 0.0, sources: tuple[Source, ...] | None = None
) -> Result:
    """One load, from an empty cluster on."""
    profile = profile_named(world.profile)
    served = ServedModel("simulated", profile, profile, [Router("kv", random=random.Random(world.seed))])
    cluster = SimulatedCluster([served], admission=world.admission, request_timeout_s=_REQUEST_TIMEOUT_S)
    cluster.members.begin("simulated", world.prefill, world.decode)
    clients = Clients(cluster, world)
    cluster.watchers.append(clients)
    more = (sources,) if sources else ()
    cluster.run(draw(rate_per_s, world.seconds, world.seed, world.lengths, *more))
    return result(clients.tries, times_capacity, rate_per_s, world.warm_s, world.seconds)


def capacity(world: World, start_per_s: float) -> tuple[float, list[Result]]:
    """Ramp until goodput stops growing, with all requests realtime: the highest rate at which they keep that SLO."""
    sources, steps = (Source("acme", "realtime", 1.0),), list[Result]()
    rate_per_s, best = start_per_s, 0.0
    while True:
        one = replay(world, rate_per_s, sources=sources)
        steps.append(one)
        if one.goodput_per_s < best * _GROWS and one.classes[0].attainment < KEEPS_UP:
            return best, steps
        best = max(best, min(one.goodput_per_s, rate_per_s))
        rate_per_s *= _CAPACITY_STEP
