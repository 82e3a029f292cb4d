"""What all frontends told of their traffic, added up for one interval of the planner.

Pure: the time is passed in. A report counts once, whenever and however often it comes; what waits is as of each
frontend's newest report, and a frontend that fell silent has nothing waiting any more. Reports are soft state: nothing
is kept beyond the next look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.observation import Traffic
from slipstream.errors import InvalidRequestError, UnavailableError
from slipstream.latency_counts import LAST_BUCKET, LatencyCounts
from slipstream.v1.planner_pb2 import LatencyHistogram, TrafficPart, TrafficReport

REPORT_EVERY_S = 1.0
SILENT_AFTER_S = 5.0
"""Without a report for this long a frontend is taken to be gone."""
LONGEST_INTERVAL_S = 10.0
"""Counts of a longer time than this, as of a frontend that found its planner again, say nothing of now."""
REMEMBERED = 64
"""Reports of one frontend that may overtake each other."""
MAX_FRONTENDS = 4096
MAX_PARTS = 768
MAX_NAME_CHARS = 256
CLASSES = ("realtime", "nearline", "batch")

_COUNTS = (
    "arrivals",
    "refused",
    "failed",
    "input_tokens",
    "computed_prompt_tokens",
    "cached_tokens",
    "finished",
    "output_tokens",
)

Sums = dict[tuple[str, str], Traffic]


@dataclass(slots=True)
class _Frontend:
    heard_s: float
    latest: int = 0
    taken: set[int] = field(default_factory=set)
    waiting: Sums = field(default_factory=dict)


class TrafficBook:
    """The frontends' reports since the last look.

    Args:
        now_s: of a clock that never goes backwards, when the first report may come.
    """

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._frontends: dict[str, _Frontend] = {}
        self._sums: Sums = {}

    def __len__(self) -> int:
        """Frontends heard of."""
        return len(self._frontends)

    def whole(self, now_s: float) -> bool:
        """Whether every frontend had the time to be heard."""
        return now_s - self._began_s >= SILENT_AFTER_S

    def take(self, report: TrafficReport, now_s: float) -> None:
        """A report came, perhaps not for the first time.

        Raises:
            InvalidRequestError: it is misshapen.
            UnavailableError: there are `MAX_FRONTENDS` others.
        """
        _check(report)
        known = self._frontends.get(report.frontend_id)
        if known is None:
            if len(self._frontends) >= MAX_FRONTENDS:
                raise UnavailableError(f"{len(self._frontends)} frontends report, the limit is {MAX_FRONTENDS}")
            known = self._frontends[report.frontend_id] = _Frontend(now_s)
        known.heard_s = now_s
        if report.sequence in known.taken or report.sequence <= known.latest - REMEMBERED:
            return
        known.taken.add(report.sequence)
        if report.sequence > known.latest:
            known.latest = report.sequence
            known.taken = {one for one in known.taken if one > known.latest - REMEMBERED}
            known.waiting = {_name(part): _waiting(part) for part in report.parts if part.queued}
        if report.interval_s <= LONGEST_INTERVAL_S:
            _add(self._sums, ((_name(part), _counted(part)) for part in report.parts))

    def collect(self, now_s: float) -> Sums:
        """What came since the last look, and what waits now."""
        sums, self._sums = self._sums, {}
        self._frontends = {name: one for name, one in self._frontends.items() if now_s - one.heard_s < SILENT_AFTER_S}
        for one in self._frontends.values():
            _add(sums, one.waiting.items())
        return sums


def _add(sums: Sums, parts: Iterable[tuple[tuple[str, str], Traffic]]) -> None:
    for name, part in parts:
        sums.setdefault(name, Traffic()).merge(part)


def _name(part: TrafficPart) -> tuple[str, str]:
    return part.model, part.service_class


def _counted(part: TrafficPart) -> Traffic:
    counts = {name: getattr(part, name) for name in _COUNTS}
    return Traffic(**counts, ttft=_latency(part.ttft), itl=_latency(part.itl))


def _waiting(part: TrafficPart) -> Traffic:
    return Traffic(queued=part.queued, queued_tokens=part.queued_tokens, oldest_wait_s=part.oldest_wait_s)


def _latency(histogram: LatencyHistogram) -> LatencyCounts:
    return LatencyCounts(dict(zip(histogram.buckets, histogram.counts, strict=True)), histogram.total_s)


def _check(report: TrafficReport) -> None:
    name = report.frontend_id
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise _wrong("frontend_id", f"it has {len(name)} characters", f"1 to {MAX_NAME_CHARS} printable ones")
    if len(report.parts) > MAX_PARTS:
        raise _wrong("parts", f"{len(report.parts)} of them", f"at most {MAX_PARTS}")
    if not _is_duration(report.interval_s):
        raise _wrong("interval_s", f"it is {report.interval_s}", "a number of seconds, 0 or more")
    for part in report.parts:
        if not 1 <= len(part.model) <= MAX_NAME_CHARS:
            raise _wrong("parts.model", f"it has {len(part.model)} characters", f"1 to {MAX_NAME_CHARS}")
        if part.service_class not in CLASSES:
            raise _wrong("parts.service_class", f"it is {part.service_class[:32]!r}", f"one of {', '.join(CLASSES)}")
        if not _is_duration(part.oldest_wait_s):
            raise _wrong("parts.oldest_wait_s", f"it is {part.oldest_wait_s}", "a number of seconds, 0 or more")
        for field_name, histogram in (("ttft", part.ttft), ("itl", part.itl)):
            _check_histogram(f"parts.{field_name}", histogram)


def _check_histogram(name: str, histogram: LatencyHistogram) -> None:
    buckets, counts = histogram.buckets, histogram.counts
    if len(buckets) != len(counts) or len(buckets) > LAST_BUCKET + 1:
        raise _wrong(name, f"{len(buckets)} buckets and {len(counts)} counts", "one count for each bucket")
    if any(bucket > LAST_BUCKET for bucket in buckets) or len(set(buckets)) != len(buckets):
        raise _wrong(f"{name}.buckets", "one is too large, or there twice", f"different ones up to {LAST_BUCKET}")
    if not _is_duration(histogram.total_s):
        raise _wrong(f"{name}.total_s", f"it is {histogram.total_s}", "a number of seconds, 0 or more")


def _is_duration(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _wrong(name: str, found: str, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {found}; allowed: {allowed}", param=name)
