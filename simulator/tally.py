"""Counts of a run as it goes: a request is counted when it ends and then forgotten, so that memory does not grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.objectives import Objective
from simulator.members import Member
from simulator.outcome import Figures, Interval, Latencies
from simulator.serving import SimulatedCluster
from simulator.underway import Underway
from slipstream.latency_counts import LatencyCounts
from slipstream.v1.registry_pb2 import Role, WorkerState

Objectives = Mapping[str, Mapping[str, Objective]]
"""By model and class."""

_NO_LIMIT = Objective(float("inf"), float("inf"))


@dataclass(slots=True)
class Counts:
    """Of some requests."""

    requests: int = 0
    refused: int = 0
    failed: int = 0
    finished: int = 0
    good: int = 0
    in_ttft: int = 0
    in_itl: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    spared_tokens: int = 0
    ttft: LatencyCounts = field(default_factory=LatencyCounts)
    itl: LatencyCounts = field(default_factory=LatencyCounts)
    e2e: LatencyCounts = field(default_factory=LatencyCounts)

    def add(self, other: Counts) -> None:
        """Another's as well."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)
        self.e2e.merge(other.e2e)

    def figures(self, model: str, service_class: str, duration_s: float) -> Figures:
        """As they are told."""
        whole = max(1, self.requests)
        return Figures(
            model,
            service_class,
            self.requests,
            self.refused,
            self.failed,
            self.finished,
            self.good,
            self.good / whole if self.requests else 1.0,
            self.in_ttft / whole if self.requests else 1.0,
            self.in_itl / whole if self.requests else 1.0,
            self.good / duration_s if duration_s > 0 else 0.0,
            self.input_tokens,
            self.output_tokens,
            self.spared_tokens / self.prompt_tokens if self.prompt_tokens else 0.0,
            Latencies.of(self.ttft),
            Latencies.of(self.itl),
            Latencies.of(self.e2e),
        )


_NUMBERS = tuple(name for name in Counts.__slots__ if name not in ("ttft", "itl", "e2e"))


class Tally:
    """A cluster's watcher: totals by model and class, and by model a row for each piece of time.

    Args:
        series_s: length of a piece.
    """

    def __init__(self, cluster: SimulatedCluster, objectives: Objectives, series_s: float) -> None:
        self._cluster = cluster
        self._objectives = objectives
        self._series_s = series_s
        self._now = {model: Counts() for model in cluster.pools}
        self.totals: dict[tuple[str, str], Counts] = {}
        self.series: list[Interval] = []
        self.peak_gpus = cluster.members.gpus

    def begin(self) -> None:
        """The first piece ends one length from now."""
        self._cluster.loop.after(self._series_s, self._tick)

    def end(self) -> None:
        """The last, shorter one."""
        self._take_row()

    def _tick(self) -> None:
        if self._cluster.busy:
            self._take_row()
            self._cluster.loop.after(self._series_s, self._tick)

    # -- as a watcher -------------------------------------------------------------------------------------

    def arrived(self, under: Underway) -> None:
        tokens = under.journey.arrival.input_tokens
        for counts in self._of(under):
            counts.requests += 1
            counts.input_tokens += tokens

    def refused(self, under: Underway) -> None:
        for counts in self._of(under):
            counts.refused += 1

    def computed(self, under: Underway) -> None:
        """Counted at the end."""

    def first_token(self, under: Underway) -> None:
        """Counted now: a request may take an hour to end."""
        ttft_s = under.journey.ttft_s
        for counts in self._of(under):
            counts.ttft.add(ttft_s)

    def ended(self, under: Underway) -> None:
        journey = under.journey
        if journey.error:
            for counts in self._of(under):
                counts.failed += 1
            return
        limit = self._objectives.get(under.model, {}).get(under.claim.priority.label, _NO_LIMIT)
        tpot_s, several = journey.tpot_s, journey.arrival.output_tokens > 1
        in_ttft, in_itl = journey.ttft_s <= limit.ttft_s, tpot_s <= limit.itl_s
        for counts in self._of(under):
            counts.finished += 1
            counts.good += in_ttft and in_itl
            counts.in_ttft += in_ttft
            counts.in_itl += in_itl
            counts.output_tokens += journey.arrival.output_tokens
            counts.prompt_tokens += journey.arrival.input_tokens
            counts.spared_tokens += journey.cached_tokens + journey.fetched_tokens
            counts.e2e.add(journey.e2e_s)
            if several:
                counts.itl.add(tpot_s)

    def _of(self, under: Underway) -> tuple[Counts, Counts]:
        key = under.model, under.claim.priority.label
        total = self.totals.get(key)
        if total is None:
            total = self.totals[key] = Counts()
        return total, self._now[under.model]

    def _take_row(self) -> None:
        members = self._cluster.members
        self.peak_gpus = max(self.peak_gpus, members.gpus)
        for model, counts in self._now.items():
            self._now[model] = Counts()
            present = members.of(model)
            loads = [one.worker.load() for one in present]
            gates = [one.gate for one in self._cluster.pools[model].frontends if one.gate is not None]
            self.series.append(
                Interval(
                    self._cluster.loop.now_s,
                    model,
                    counts.requests,
                    counts.refused,
                    counts.failed,
                    counts.finished,
                    counts.good,
                    counts.ttft.percentile_s(50),
                    counts.ttft.percentile_s(99),
                    counts.itl.percentile_s(50),
                    counts.itl.percentile_s(99),
                    sum(len(gate.scheduler.queues) for gate in gates),
                    sum(load.waiting for load in loads),
                    sum(load.running for load in loads),
                    _serving(present, Role.ROLE_PREFILL),
                    _serving(present, Role.ROLE_DECODE),
                    sum(1 for one in present if one.state == WorkerState.STARTING),
                    sum(1 for one in present if one.state == WorkerState.DRAINING),
                    sum(one.gpus for one in present),
                )
            )


def _serving(members: list[Member], role: Role.ValueType) -> int:
    return sum(1 for one in members if one.role == role and one.state == WorkerState.READY)
