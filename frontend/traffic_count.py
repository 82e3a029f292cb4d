"""What came and what became of it since the last report, by model and priority class: what the planner plans by.

Counted once a request where it arrives, has its first token and ends; nothing here runs for each token. Plain data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from frontend.request_record import RequestRecord
from slipstream.latency_counts import LatencyCounts
from slipstream.v1.planner_pb2 import LatencyHistogram, TrafficPart

RECENT_S = 60.0
_SUCCEEDED = ("200", "OK")
_FAILED_GRPC = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


@dataclass(slots=True)
class Counted:
    """One model's requests of one class; see `planner.observation.Traffic` for what each figure counts."""

    arrivals: int = 0
    refused: int = 0
    failed: int = 0
    input_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_tokens: int = 0
    finished: int = 0
    output_tokens: int = 0
    ttft: LatencyCounts = field(default_factory=LatencyCounts)
    itl: LatencyCounts = field(default_factory=LatencyCounts)

    def to_wire(self, model: str, service_class: str) -> TrafficPart:
        return TrafficPart(
            model=model,
            service_class=service_class,
            arrivals=self.arrivals,
            refused=self.refused,
            failed=self.failed,
            input_tokens=self.input_tokens,
            computed_prompt_tokens=self.computed_prompt_tokens,
            cached_tokens=self.cached_tokens,
            finished=self.finished,
            output_tokens=self.output_tokens,
            ttft=_histogram(self.ttft),
            itl=_histogram(self.itl),
        )


@dataclass(slots=True)
class Queued:
    """Requests that wait in this frontend now; see `planner.observation.Traffic`."""

    requests: int = 0
    prompt_tokens: int = 0
    oldest_wait_s: float = 0.0


class RecentLatencies:
    """What was seen within the last half to whole `RECENT_S`, of all models and classes."""

    def __init__(self) -> None:
        self._turned_s = 0.0
        self._ttft, self._itl = (LatencyCounts(), LatencyCounts()), (LatencyCounts(), LatencyCounts())

    def turn(self, now_s: float) -> None:
        """Forget what is too old; call it before reading."""
        halves = int((now_s - self._turned_s) / (RECENT_S / 2))
        if halves >= 1:
            self._turned_s = now_s
            older = (LatencyCounts(), LatencyCounts()) if halves > 1 else (self._ttft[1], self._itl[1])
            self._ttft, self._itl = (older[0], LatencyCounts()), (older[1], LatencyCounts())

    def note(self, ttft_s: float | None, itl_s: float | None) -> None:
        """One more request has ended."""
        if ttft_s is not None:
            self._ttft[1].add(ttft_s)
        if itl_s is not None:
            self._itl[1].add(itl_s)

    @property
    def ttft(self) -> LatencyCounts:
        return _sum(self._ttft)

    @property
    def itl(self) -> LatencyCounts:
        return _sum(self._itl)


def _sum(halves: tuple[LatencyCounts, LatencyCounts]) -> LatencyCounts:
    whole = LatencyCounts()
    for half in halves:
        whole.merge(half)
    return whole


class TrafficCount:
    """The counts of one process since they were last taken.

    Attributes:
        recent: latencies that are kept beside; taking does not empty them.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, str], Counted] = {}
        self.recent = RecentLatencies()

    def of(self, model: str, service_class: str) -> Counted:
        """To be counted into, now."""
        part = self._parts.get((model, service_class))
        if part is None:
            part = self._parts[model, service_class] = Counted()
        return part

    def arrived(self, model: str, service_class: str, prompt_tokens: int) -> None:
        """A request was let in, to the workers or into the queue."""
        part = self.of(model, service_class)
        part.arrivals += 1
        part.input_tokens += prompt_tokens

    def refused(self, model: str, service_class: str) -> None:
        """A request was sent away at the door."""
        self.of(model, service_class).refused += 1

    def shed(self, model: str, service_class: str) -> None:
        """A request that was let in gave way to another one."""
        self.of(model, service_class).failed += 1

    def first_token(self, record: RequestRecord) -> None:
        """The first token of a request has come."""
        if record.ttft_s is not None:
            self.of(record.model, record.service_class).ttft.add(record.ttft_s)

    def ended(self, model: str, record: RequestRecord) -> None:
        """A request is over.

        Args:
            model: that it was for, also when it did not get far enough to be looked at.
        """
        if not record.service_class:
            return  # it was not about a model
        failed = _failed(record)
        if record.status in _SUCCEEDED and not failed:
            part = self.of(record.model, record.service_class)
            self.recent.note(record.ttft_s, record.itl_s if record.sequences == 1 else None)
            part.finished += record.sequences
            part.output_tokens += record.completion_tokens
            part.cached_tokens += record.cached_tokens
            part.computed_prompt_tokens += max(0, record.prompt_tokens - record.cached_tokens)
            if record.itl_s is not None and record.sequences == 1:
                part.itl.add(record.itl_s)
        elif failed and record.model:
            self.of(record.model, record.service_class).failed += record.sequences
        elif failed:  # no worker was there to take it
            self.of(model, record.service_class).refused += 1

    def take(self) -> dict[tuple[str, str], Counted]:
        """All there is, and begin anew."""
        parts, self._parts = self._parts, {}
        return parts


TRAFFIC = TrafficCount()
"""Of this process."""


def _failed(record: RequestRecord) -> bool:
    """Whether it was the service's fault. What was refused for lack of room is counted where that was decided."""
    status = record.status
    if status in _SUCCEEDED:
        return bool(record.error)  # it broke in the middle
    return status in _FAILED_GRPC or (status.isdigit() and int(status) >= 500)


def _histogram(latency: LatencyCounts) -> LatencyHistogram | None:
    pairs = list(latency.pairs())
    if not pairs:
        return None
    return LatencyHistogram(
        buckets=[bucket for bucket, _ in pairs], counts=[count for _, count in pairs], total_s=latency.total_s
    )
