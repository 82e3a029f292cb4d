"""Latencies as counts in fixed buckets: merged by adding, sent as pairs, read as percentiles.

The buckets grow by a tenth each: a percentile is exact to 5% from 0.1 ms to a day, whatever was merged, and a
distribution of any number of requests is at most a few hundred integers. Frontends report them, the planner adds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

LEAST_S = 1e-4
MOST_S = 86400.0
GROWTH = 1.1

_LOG_GROWTH = math.log(GROWTH)
LAST_BUCKET = math.ceil(math.log(MOST_S / LEAST_S) / _LOG_GROWTH)
"""Bucket 0 holds what took `LEAST_S` or less; this one what took `MOST_S` or more."""


class LatencyCounts:
    """How many requests took how long. Adding is cheap enough for each token of a busy frontend."""

    __slots__ = ("_counts", "total_s")

    def __init__(self, counts: Mapping[int, int] | None = None, total_s: float = 0.0) -> None:
        self._counts: Counter[int] = Counter(counts or {})
        self.total_s = total_s

    def add(self, seconds: float, times: int = 1) -> None:
        """One more that took so long; what is negative or no number is taken for 0."""
        seconds = seconds if seconds > 0 else 0.0
        self._counts[bucket_of(seconds)] += times
        self.total_s += seconds * times

    def merge(self, other: LatencyCounts) -> None:
        """Take another's in."""
        self._counts.update(other._counts)
        self.total_s += other.total_s

    def __len__(self) -> int:
        return self._counts.total()

    @property
    def mean_s(self) -> float:
        """0 of nothing."""
        whole = len(self)
        return self.total_s / whole if whole else 0.0

    def percentile_s(self, percent: float) -> float:
        """The middle of the bucket in which it lies; 0 of nothing."""
        wanted = len(self) * percent / 100.0
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return middle_s(bucket)
        return 0.0

    def share_within(self, limit_s: float) -> float:
        """Of all, those that took no longer; 1 of nothing. A bucket that the limit cuts counts by its middle."""
        whole = len(self)
        if not whole:
            return 1.0
        within = sum(count for bucket, count in self._counts.items() if middle_s(bucket) <= limit_s)
        return within / whole

    def pairs(self) -> Iterable[tuple[int, int]]:
        """Bucket and count, by rising bucket."""
        return sorted(self._counts.items())


def bucket_of(seconds: float) -> int:
    """0 to `LAST_BUCKET`."""
    if seconds <= LEAST_S:
        return 0
    if seconds >= MOST_S:
        return LAST_BUCKET
    return math.ceil(math.log(seconds / LEAST_S) / _LOG_GROWTH)


def middle_s(bucket: int) -> float:
    """The geometric middle of a bucket's bounds, in seconds."""
    return LEAST_S if bucket == 0 else LEAST_S * GROWTH ** (bucket - 0.5)
