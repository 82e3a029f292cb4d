"""Latencies around a loss, second by second, and when they are as they were before. Pure.

A window is one second, numbered from the loss: -1 is the last before it, 0 the first after it. A token belongs to the
window in which it came, so that what the loss held up counts when it was over.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.load import Answer
from benchmarks.samples import percentile

NORMAL = 1.2
"""Times the median of the windows before."""
RUN = 5
"""Of so many windows in a row most have to be normal, to the end: of a few dozen samples a second the slowest is now
and then an odd one, before a loss as after it."""


@dataclass(frozen=True, slots=True)
class Windows:
    """99th percentiles in milliseconds, by window; windows in which nothing came are not there."""

    ttft_p99_ms: dict[int, float]
    itl_p99_ms: dict[int, float]


@dataclass(frozen=True, slots=True)
class Recovery:
    """Of one latency.

    Attributes:
        limit_ms: what is normal: `NORMAL` times the median of the windows before, or what nine tenths of them kept
            to, whichever is more.
        worst_ms: of a window after the loss.
        back_s: from the loss to the first normal window from which on most of any `RUN` in a row are normal; None:
            never. What the replacements' start disturbs later counts too.
    """

    before_median_ms: float
    limit_ms: float
    worst_ms: float
    back_s: float | None


def windows(answers: Iterable[Answer], lost_s: float) -> Windows:
    """Of answers whose times are by the same clock as `lost_s`."""
    ttft, itl = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for answer in answers:
        ttft[math.floor(answer.arrivals_s[0] - lost_s)].append(answer.ttft_s)
        for before_s, after_s in itertools.pairwise(answer.arrivals_s):
            itl[math.floor(after_s - lost_s)].append(after_s - before_s)
    return Windows(_p99_ms(ttft), _p99_ms(itl))


def recovery(by_window: Mapping[int, float], first: int, last: int) -> Recovery:
    """When a latency is back to normal.

    Args:
        first: the first window that counts: the load was steady from here.
        last: the last that counts: it still was.
    """
    before = [by_window[number] for number in range(first, 0) if number in by_window]
    after = {number: by_window.get(number, math.inf) for number in range(last + 1)}
    median_ms = statistics.median(before)
    limit_ms = max(NORMAL * median_ms, percentile(before, 90))
    seen = [one for one in after.values() if one < math.inf]
    back_s = _settled_from([one <= limit_ms for one in after.values()])
    return Recovery(median_ms, limit_ms, max(seen, default=math.inf), back_s)


def _settled_from(normal: Sequence[bool]) -> float | None:
    """The first normal window from which on most of any `RUN` are."""
    for number in range(len(normal)):
        runs = (normal[at : at + RUN] for at in range(number, max(number, len(normal) - RUN) + 1))
        if normal[number] and all(sum(run) * 2 > len(run) for run in runs):
            return float(number)
    return None


def _p99_ms(samples_s: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {number: round(percentile(samples_s[number], 99) * 1e3, 3) for number in sorted(samples_s)}
