"""Clients that ask again as soon as they are answered, in virtual time: how throughput is usually measured.

One worker that computes prompts and answers, or a cluster of both roles; the scheduler, the worker and the cluster are
the simulator's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from engine.simulated.request import Event, EventKind, Request
from frontend.router.choice import Router
from simulator.event_loop import EventLoop
from simulator.journey import Journey, KeptJourneys
from simulator.serving import MODEL, ServedModel, SimulatedCluster
from simulator.traces import Arrival
from simulator.worker import SimulatedWorker
from slipstream.performance import Predictor, Profile
from slipstream.v1.registry_pb2 import Role


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients ask.

    Attributes:
        clients: requests under way at any time, until the last ones.
        requests: in all.
        turn_s: mean time from an answer's end to the client's next question's arrival, exponentially distributed.
        least_share: lengths are drawn evenly from this share of `input_tokens` and `output_tokens` up to all of it.
    """

    input_tokens: int
    output_tokens: int
    clients: int
    requests: int
    least_share: float = 1.0
    turn_s: float = 0.0
    seed: int = 1

    def lengths(self) -> Iterator[tuple[int, int]]:
        """Of each prompt and its answer."""
        draw = random.Random(self.seed)
        for _ in range(self.requests):
            yield self._draw(draw, self.input_tokens), self._draw(draw, self.output_tokens)

    def turns_s(self) -> Iterator[float]:
        """What passes before a client's next question comes."""
        draw = random.Random(self.seed + 1)
        while True:
            yield draw.expovariate(1 / self.turn_s) if self.turn_s > 0 else 0.0

    def _draw(self, draw: random.Random, most: int) -> int:
        return draw.randint(max(1, int(most * self.least_share)), most)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Means over all requests, as the measured rows give them."""

    ttft_s: float
    tpot_s: float
    preemptions: int


def aggregated(predictor: Predictor, load: Load) -> Latencies:
    """One worker does all."""
    loop, lengths, turns_s = EventLoop(), load.lengths(), load.turns_s()
    journeys: dict[str, Journey] = {}

    def on_event(worker: SimulatedWorker, event: Event) -> None:
        journey = journeys[event.request.request_id]
        if event.kind is EventKind.PROMPT_COMPUTED:
            journey.first_token_s = loop.now_s
        elif event.kind is EventKind.PREEMPTED:
            journey.preemptions += 1
        elif event.kind is EventKind.FINISHED:
            journey.ended_s = loop.now_s
            loop.after(next(turns_s), ask)

    worker = SimulatedWorker(
        loop, "one", Role.ROLE_DECODE, predictor, on_event=on_event, on_begun=lambda _worker, _request: None
    )

    def ask() -> None:
        drawn = next(lengths, None)
        if drawn is not None:
            arrival = Arrival(loop.now_s, str(len(journeys)), *drawn)
            journeys[arrival.request_id] = Journey(arrival)
            worker.add(Request(arrival.request_id, *drawn, []))

    for _ in range(load.clients):
        loop.at(next(turns_s), ask)
    loop.run()
    return _latencies(list(journeys.values()))


class _ClosedLoop(SimulatedCluster):
    """A cluster whose clients send their next request when the last one has ended. One of its own watchers."""

    def serve(self, load: Load) -> None:
        self._lengths, self._turns_s, self._asked = load.lengths(), load.turns_s(), 0
        for _ in range(load.clients):
            self.loop.at(next(self._turns_s), self._ask)
        self.loop.run()

    def _ask(self) -> None:
        drawn = next(self._lengths, None)
        if drawn is not None:
            self._asked += 1
            self._arrive(Arrival(self.loop.now_s, str(self._asked), *drawn), iter(()))

    def _left(self) -> None:
        """The end is when nobody asks any more, not when nothing is under way."""
        self._open -= 1
        self.loop.after(next(self._turns_s), self._ask)


def disaggregated(profiles: tuple[Profile, Profile], counts: tuple[int, int], load: Load) -> Latencies:
    """Prefill and decode workers, every prompt handed over; requests go where least waits."""
    cluster = _ClosedLoop([ServedModel(MODEL, *profiles, [Router(policy="load")])])
    cluster.members.begin(MODEL, *counts)
    kept = KeptJourneys()
    cluster.watchers.append(kept)
    cluster.serve(load)
    return _latencies(kept.journeys)


def _latencies(journeys: list[Journey]) -> Latencies:
    done = [one for one in journeys if one.ended_s >= 0 and not one.error]
    if not done:
        return Latencies(0.0, 0.0, 0)
    return Latencies(
        sum(one.ttft_s for one in done) / len(done),
        sum(one.tpot_s for one in done) / len(done),
        sum(one.preemptions for one in done),
    )
