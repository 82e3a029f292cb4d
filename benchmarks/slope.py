"""Whether a figure grows: Theil's and Sen's slope, which a few wild samples do not move, with its confidence. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

_Z = 1.96
_MOST_POINTS = 400
"""More samples are put together into medians: all pairs are looked at."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Per hour, with the limits of its 95% confidence."""

    per_hour: float
    low: float
    high: float


def slope(times_s: Sequence[float], values: Sequence[float]) -> Slope:
    """Of all pairs the median slope; its confidence is Sen's (1968), by the ranks of the pairs.

    Raises:
        ValueError: fewer than three samples.
    """
    if len(times_s) != len(values) or len(times_s) < 3:
        raise ValueError(f"a slope of {len(values)} samples")
    times, figures = _together(times_s, values)
    count = len(times)
    first, second = np.triu_indices(count, 1)
    passed = times[second] - times[first]
    slopes = np.sort((figures[second] - figures[first])[passed > 0] / passed[passed > 0])
    spread = _Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    return Slope(*(float(one) * 3600 for one in (np.median(slopes), slopes[low], slopes[high])))


def _together(times_s: Sequence[float], values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    size = math.ceil(len(times_s) / _MOST_POINTS)
    starts = range(0, len(times_s) - size + 1, size)
    return (
        np.array([median(times_s[start : start + size]) for start in starts], np.float64),
        np.array([median(values[start : start + size]) for start in starts], np.float64),
    )
