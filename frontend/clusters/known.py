"""What a global frontend knows of one frontend of a cluster. Pure state: events and the time are passed in.

What it says is up to a poll old. What this global frontend has sent there since is added, and the other global
frontends are taken to send as much as this one: else all would run down the cluster that was idle a moment ago
(Mitzenmacher, How Useful Is Old Information, 2000; `frontend.router.pool` does the same for workers).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from frontend.cluster_state import ClusterState, ModelState
from frontend.clusters.breaker import Breaker, Health
from frontend.clusters.choice import UNKNOWN_BYTES_PER_TOKEN, Candidate, seconds_for
from frontend.prefix_names import PrefixNames, decoded, places

MAX_ECHO = 64.0
RTT_DECAY = 0.8
MAX_OWN_NAMES = 8192
OWN_NAMES_KEPT_S = 60.0
"""What this global frontend has sent to a cluster counts as cached there for so long, unless the cluster says so."""


@dataclass(slots=True)
class Sent:
    """A request that was sent there; `prefill_s` is predicted."""

    at_s: float
    prefill_s: float


@dataclass(slots=True)
class KnownFrontend:
    """One frontend of one cluster.

    Attributes:
        endpoint: unique among all; the cluster's name and a number.
        limit: requests in flight at most, of the whole cluster.
        heard_s: when its state was last heard; None before.
        refusal: why it does not want this global frontend; empty otherwise.
        prefixes: names of what it has cached.
    """

    endpoint: str
    cluster: str
    limit: int
    state: ClusterState | None = None
    heard_s: float | None = None
    refusal: str = ""
    failure: str = ""
    rtt_s: float = 0.0
    in_flight: int = 0
    prefixes: frozenset[int] = frozenset()
    http: Breaker = field(default_factory=Breaker)
    grpc: Breaker = field(default_factory=Breaker)
    _least_rtt_s: float = float("inf")
    _fresh: list[Sent] = field(default_factory=list)
    _own_names: OrderedDict[int, float] = field(default_factory=OrderedDict)

    def heard(self, state: ClusterState, asked_s: float, now_s: float) -> None:
        """It has answered how it is."""
        again = self.state is None or self.refusal != "" or self.failure != ""
        if self.state is not None and self.state.frontend_id != state.frontend_id:
            # Another process, which has done nothing wrong yet.
            self._own_names.clear()
            self.http.succeeded()
            self.grpc.succeeded()
        self.state, self.heard_s, self.refusal, self.failure = state, now_s, "", ""
        if state.prefixes is not None:
            self.prefixes = frozenset(decoded(state.prefixes))
        rtt_s = max(0.0, now_s - asked_s - state.took_s)
        self._least_rtt_s = min(self._least_rtt_s * (1.0 if again else 1.01), rtt_s)
        # One answer that was held up, here or there, says little of the way.
        rtt_s = min(rtt_s, 4 * self._least_rtt_s + 0.001)
        self.rtt_s = rtt_s if again else RTT_DECAY * self.rtt_s + (1 - RTT_DECAY) * rtt_s
        self._fresh = [one for one in self._fresh if one.at_s >= asked_s]

    def silent(self, why: str, *, refused: bool = False) -> None:
        """It has not answered how it is."""
        self.failure = why
        if refused:
            self.refusal = why

    def model(self, name: str) -> ModelState | None:
        """What it says of a model; of the one that it serves when `name` is empty."""
        if self.state is None:
            return None
        return next((one for one in self.state.models if not name or one.name == name), None)

    def begin(self, prefill_s: float, now_s: float) -> None:
        """A request is sent there; call `end` once."""
        self.in_flight += 1
        self._fresh.append(Sent(now_s, prefill_s))

    def answered(self, names: PrefixNames, now_s: float) -> None:
        """A prompt was computed there, so its beginnings are cached."""
        for name in names.names:
            self._own_names[name] = now_s
            self._own_names.move_to_end(name)
        while len(self._own_names) > MAX_OWN_NAMES:
            self._own_names.popitem(last=False)

    def end(self) -> None:
        self.in_flight -= 1
        assert self.in_flight >= 0, "more requests ended than began"

    def stale(self, now_s: float, stale_after_s: float) -> bool:
        """Whether nothing was heard for too long."""
        return self.heard_s is None or now_s - self.heard_s > stale_after_s

    def usable(self, breaker: Breaker, now_s: float, stale_after_s: float) -> Health:
        """Whether requests may go there."""
        state = self.state
        if self.refusal or state is None or self.stale(now_s, stale_after_s) or not state.ready or state.draining:
            return Health.DOWN
        return breaker.health(now_s)

    def cached_bytes(self, names: PrefixNames, now_s: float) -> int:
        """Of a prompt's beginning, what its cluster has."""
        cached = 0
        for name, place in zip(names.names, places(names.prompt_bytes), strict=False):
            if name not in self.prefixes and now_s - self._own_names.get(name, -OWN_NAMES_KEPT_S) >= OWN_NAMES_KEPT_S:
                break
            cached = place
        return cached

    def fresh_s(self, workers: int) -> float:
        """What was sent there since it spoke, by this global frontend and, supposedly, by the others."""
        if not self._fresh:
            return 0.0
        others = min(max(0, (self.state.global_frontends if self.state else 1) - 1), MAX_ECHO)
        return sum(one.prefill_s for one in self._fresh) * (1 + others) / max(1, workers)


def candidate(
    one: KnownFrontend,
    breaker: Breaker,
    model: str,
    service_class: str,
    now_s: float,
    *,
    stale_after_s: float,
    in_flight: int,
    cached_bytes: int,
) -> Candidate:
    """A frontend as it is for one request.

    Args:
        in_flight: of its whole cluster; cached_bytes: of the prompt, by any of its cluster's frontends.
    """
    said = one.model(model)
    health = one.usable(breaker, now_s, stale_after_s)
    if said is None:
        return Candidate(one.endpoint, one.cluster, Health.DOWN, one.limit - in_flight, one.rtt_s)
    return Candidate(
        one.endpoint,
        one.cluster,
        health,
        min(one.limit - in_flight, said.room.get(service_class, 1)),
        one.rtt_s,
        said.wait_s.get(service_class, 0.0) + one.fresh_s(said.prefill_workers or said.decode_workers),
        said.ready_s,
        cached_bytes,
        said.bytes_per_token or UNKNOWN_BYTES_PER_TOKEN,
    )


def prefill_s(tokens: int, ready_s: Sequence[tuple[int, float]]) -> float:
    """Of the seconds to the first token, those that computing so many tokens takes."""
    return max(0.0, seconds_for(tokens, ready_s) - seconds_for(1, ready_s))
