"""What samples come to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, interpolated between neighbours.

    Raises:
        ValueError: no samples, or `percent` not within 0 and 100.
    """
    if not samples or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(samples)} samples")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """How samples of one duration are spread, in milliseconds."""

    samples: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    max_ms: float


def spread(samples_s: Sequence[float]) -> Spread | None:
    """Of durations in seconds; None when there are none."""
    if not samples_s:
        return None
    milliseconds = [sample_s * 1e3 for sample_s in samples_s]
    return Spread(
        samples=len(milliseconds),
        mean_ms=round(sum(milliseconds) / len(milliseconds), 3),
        p50_ms=round(percentile(milliseconds, 50), 3),
        p99_ms=round(percentile(milliseconds, 99), 3),
        max_ms=round(max(milliseconds), 3),
    )


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time, in seconds of the client's clock."""

    start_s: float
    end_s: float

    def overlaps(self, start_s: float, end_s: float) -> bool:
        """Whether any part of [start_s, end_s] lies inside."""
        return start_s < self.end_s and end_s > self.start_s


def split_gaps(
    arrivals_s: Sequence[float], windows: Sequence[Window], since_s: float
) -> tuple[list[float], list[float]]:
    """Inter-token latencies of one stream: those that touch a window, and the others after `since_s`.

    A gap counts for a window when any part of it lies inside: the token that a long prompt held up often arrives
    just after the prompt's own first token, and leaving it out would leave out the stall itself.
    """
    inside, outside = [], []
    for before_s, after_s in itertools.pairwise(arrivals_s):
        if any(window.overlaps(before_s, after_s) for window in windows):
            inside.append(after_s - before_s)
        elif before_s >= since_s:
            outside.append(after_s - before_s)
    return inside, outside
