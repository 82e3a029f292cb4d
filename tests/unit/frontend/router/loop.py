"""Many workers and several frontends in one loop of virtual time: what routing makes of a stream of requests.

Prefill workers compute prompts one after the other, decode workers hold a request for a while; a worker's cache keeps
every prefix that was computed there. Frontends hear of each other's work by the workers' feeds only.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from frontend.router import Ask, Fleet, Route, Router
from frontend.router.candidate import Share
from slipstream.performance import Predictor
from slipstream.v1.registry_pb2 import Load
from tests.unit.frontend.router.workers import DECODE, PREFILL, PROFILE, Worker, fast_worker

PREDICTOR = Predictor(PROFILE)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: `prefix` names the `prefix_tokens` first of its `tokens`, which others may share."""

    at_s: float
    tokens: int
    prefix: str = ""
    prefix_tokens: int = 0
    answer_tokens: int = 50
    frontend: int = 0


@dataclass(slots=True)
class Loop:
    """Run once; then read what came of it.

    Attributes:
        feed_s: between two words of a worker.
        ttft_s: of each request, by arrival.
        peak: most requests at the same time, by worker.
    """

    workers: list[Worker]
    frontends: int = 1
    feed_s: float = 0.1
    router: Callable[[], Router] = field(default=lambda: Router(always_hand_off=True))
    prefills: Counter[str] = field(default_factory=Counter)
    decodes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    peak: Counter[str] = field(default_factory=Counter)
    alone: int = 0
    _has: dict[str, set[str]] = field(default_factory=dict)
    _free_at_s: dict[str, float] = field(default_factory=dict)
    _open: Counter[str] = field(default_factory=Counter)
    _open_of: Counter[tuple[int, str]] = field(default_factory=Counter)
    _waiting: Counter[str] = field(default_factory=Counter)
    _waiting_of: Counter[tuple[int, str]] = field(default_factory=Counter)
    _events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _count: int = 0

    def run(self, arrivals: Iterable[Arrival]) -> Loop:
        fleets = [Fleet(tie_break=f"frontend-{index}") for index in range(self.frontends)]
        for fleet in fleets:
            for one in self.workers:
                fleet.put(one.record)
                fleet.note_profile(one.record.worker_id, one.profile)
        routers = [self.router() for _ in fleets]
        last_s = 0.0
        for arrival in arrivals:
            last_s = max(last_s, arrival.at_s)
            self._at(arrival.at_s, self._arrival(arrival, fleets[arrival.frontend], routers[arrival.frontend]))
        for index in range(int(last_s / self.feed_s) + 1):
            self._at(index * self.feed_s, lambda now_s: self._feed(fleets, now_s))
        while self._events:
            now_s, _, what = heapq.heappop(self._events)
            what(now_s)
        return self

    def _at(self, when_s: float, what: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, what))

    def _arrival(self, arrival: Arrival, fleet: Fleet, router: Router) -> Callable[[float], None]:
        def arrive(now_s: float) -> None:
            holders = self._has.get(arrival.prefix, set()) if arrival.prefix else set()
            ask = Ask(
                "m",
                arrival.tokens,
                arrival.answer_tokens,
                known=dict.fromkeys(holders, arrival.prefix_tokens),
                expected_tokens=arrival.answer_tokens,
            )
            self._send(arrival, fleet, router.choose(ask, fleet, now_s), now_s)

        return arrive

    def _send(self, arrival: Arrival, fleet: Fleet, route: Route, now_s: float) -> None:
        decode = route.decode.worker_id
        computing = route.prefill.worker_id if route.prefill is not None else decode
        self.alone += route.prefill is None
        self.prefills[computing] += 1
        self.decodes[decode] += 1
        known = arrival.prefix_tokens if computing in self._has.get(arrival.prefix, set()) else 0
        new_tokens = arrival.tokens - known
        shares = [(computing, fleet.begin(computing, arrival.tokens, new_tokens, now_s))]
        if computing != decode:
            shares.append((decode, fleet.begin(decode, arrival.tokens, 0, now_s)))
        for worker_id, _ in shares:
            self._open[worker_id] += 1
            self._open_of[arrival.frontend, worker_id] += 1
            self.peak[worker_id] = max(self.peak[worker_id], self._open[worker_id])
        self._waiting[computing] += new_tokens
        self._waiting_of[arrival.frontend, computing] += new_tokens
        done_s = max(now_s, self._free_at_s.get(computing, 0.0)) + PREDICTOR.prefill_s(new_tokens, known)
        self._free_at_s[computing] = done_s
        self.ttft_s.append(done_s - now_s)
        step_s = PREDICTOR.decode_s(self._open[decode], arrival.tokens)

        def computed(at_s: float) -> None:
            self._waiting[computing] -= new_tokens
            self._waiting_of[arrival.frontend, computing] -= new_tokens
            if arrival.prefix:
                self._has.setdefault(arrival.prefix, set()).add(computing)
            if computing != decode:
                self._end(arrival, shares[0], at_s)
            elif shares[0][1] is not None:
                shares[0][1].prompt_done(at_s)

        self._at(done_s, computed)
        self._at(done_s + step_s * arrival.answer_tokens, lambda at_s: self._end(arrival, shares[-1], at_s))

    def _end(self, arrival: Arrival, share: tuple[str, Share | None], now_s: float) -> None:
        worker_id, own = share
        self._open[worker_id] -= 1
        self._open_of[arrival.frontend, worker_id] -= 1
        if own is not None:
            own.end(now_s)

    def _feed(self, fleets: list[Fleet], now_s: float) -> None:
        for one in self.workers:
            name = one.record.worker_id
            for index, fleet in enumerate(fleets):
                own = index, name
                load = _load(self._open[name], self._waiting[name])
                fleet.note_load(name, load, _load(self._open_of[own], self._waiting_of[own]), now_s)


def _load(requests: int, waiting_tokens: int) -> Load:
    return Load(running=requests, waiting_tokens=waiting_tokens, context_tokens=requests * 1000)


def cluster(prefill: int, decode: int) -> list[Worker]:
    """On one host."""
    return [
        *(fast_worker(f"p{index}", PREFILL) for index in range(prefill)),
        *(fast_worker(f"d{index}", DECODE) for index in range(decode)),
    ]
