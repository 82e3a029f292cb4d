"""What will come: a rate seen once an interval, forecast over a horizon with an upper bound.

Three things are kept apart. *Noise*, arrivals that bunch as they always do, is no reason to act: the queueing model
accounts for it. A *change of level* must be followed at once. A *trend* or the *hour of the day* says what comes next.

- Level: exponentially weighted means over four windows. The longest that does not contradict a shorter one by more
  than noise explains is believed (Lepski's rule: O. Lepski, Theory of Probability and its Applications 35, 1990).
  At steady load that is the calm one, after a jump the quick one.
- Trend: the means lag behind a ramp by their windows, so that their distances are slopes (Brown's double exponential
  smoothing). The lesser of both slopes counts, which a single jump hardly moves, and it is damped with the horizon
  (Gardner and McKenzie, Management Science 31, 1985).
- Bound: by how much forecasts were exceeded, noise aside, is learned, and the next one's bound keeps that distance.
- Season: the rate by time of day of the days before. Its shape is used, scaled to today's level.

Libraries were looked at: those with prediction intervals fit a whole history at once, and bring scipy and pandas into
the light installation. This must answer within microseconds, as simulations ask it hundreds of thousands of times.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist

WINDOWS_S = (15.0, 60.0, 240.0, 960.0)
NORMAL = NormalDist()
NOISE_WINDOW_S = 900.0
SURPRISE = 3.5
"""Standard deviations by which a shorter window must differ from a longer one to be believed instead."""
BOUND_PERCENTILE = 90.0
"""Of the moments to come, the upper bound shall hold for so many."""
BOUND_DEVIATIONS = NORMAL.inv_cdf(BOUND_PERCENTILE / 100.0)
FIRST_EXCESS, MAX_EXCESS = 0.1, 0.5
EXCESS_STEP_PER_S = 0.001
TURN = 0.5
"""Of the newest slope, what is believed where the older one has the other sign."""
DAMPING_S = 90.0
"""A trend is followed for about so long, then expected to end."""
DAY_S = 86400.0
DAY_BINS = 96
BIN_S = DAY_S / DAY_BINS
NEW_DAY_WEIGHT = 0.5
MAX_SEASON_RATIO = 8.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """The mean rate in a horizon's most loaded moment, and what it stays below most of the time.

    Attributes:
        level, slope: now, and per second.
        excess: by what share forecasts are exceeded, as learned.
    """

    mean: float
    upper: float
    level: float
    slope: float = 0.0
    excess: float = 0.0


class WindowMean:
    """An exponentially weighted mean, unbiased from the first sample on.

    Attributes:
        noise_share: the mean's variance as a share of one sample's.
        age_s: how much time it has seen.
    """

    __slots__ = ("_keep", "_squares", "_sum", "_weight", "_window_s", "age_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._keep: tuple[float, float] = (0.0, 0.0)
        self._weight = self._sum = self._squares = 0.0
        self.age_s = 0.0

    def add(self, value: float, interval_s: float) -> None:
        if self._keep[0] != interval_s:
            self._keep = (interval_s, math.exp(-interval_s / self._window_s))
        keep = self._keep[1]
        new = 1.0 - keep
        self._weight = self._weight * keep + new
        self._sum = self._sum * keep + new * value
        self._squares = self._squares * keep * keep + new * new
        self.age_s += interval_s

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    @property
    def lag_s(self) -> float:
        """By how much it is late on a ramp."""
        past = math.exp(-self.age_s / self._window_s)
        return self._window_s - self.age_s * past / (1.0 - past) if self.age_s > 0.0 else 0.0

    @property
    def noise_share(self) -> float:
        return self._squares / (self._weight * self._weight) if self._weight else 1.0


class DailyShape:
    """The rate by time of day, of the days before."""

    __slots__ = ("_bin", "_rates", "_samples", "_sum")

    def __init__(self) -> None:
        self._rates: list[float | None] = [None] * DAY_BINS
        self._bin = -1
        self._sum = self._samples = 0.0

    def add(self, rate: float, interval_s: float, unix_s: float) -> None:
        place = int(unix_s % DAY_S / BIN_S)
        if place != self._bin:
            self._close()
            self._bin, self._sum, self._samples = place, 0.0, 0.0
        self._sum += rate * interval_s
        self._samples += interval_s

    def _close(self) -> None:
        # A bin that was seen in part would pass a minute's chance for a quarter of an hour's rate.
        if self._samples < BIN_S / 2:
            return
        rate, before = self._sum / self._samples, self._rates[self._bin]
        self._rates[self._bin] = rate if before is None else before + NEW_DAY_WEIGHT * (rate - before)

    def ratio(self, unix_s: float, ahead_s: float) -> float | None:
        """By what the rate usually changes from now to then; None while no day before tells."""
        now, then = self._at(unix_s), self._at(unix_s + ahead_s)
        if now is None or then is None or now <= 0.0:
            return None
        return min(then / now, MAX_SEASON_RATIO)

    def _at(self, unix_s: float) -> float | None:
        place = unix_s % DAY_S / BIN_S - 0.5
        left = math.floor(place)
        first, second = self._rates[left % DAY_BINS], self._rates[(left + 1) % DAY_BINS]
        if first is None or second is None:
            return None
        return first + (second - first) * (place - left)


class Excess:
    """By what share forecasts are exceeded, noise aside, no more often than the bound allows.

    Adaptive conformal inference (Gibbs and Candès, NeurIPS 2021): the share grows a little whenever a forecast was
    exceeded by more, and shrinks a little when not, so that in the long run the bound holds as often as it says,
    whatever the load is like. One great jump moves it no more than many small ones.

    Args:
        horizon_s: between a forecast and the moment it is held against.
    """

    __slots__ = ("_pending", "horizon_s", "share")

    def __init__(self, horizon_s: float) -> None:
        self.horizon_s = horizon_s
        self.share = FIRST_EXCESS
        self._pending: deque[tuple[float, float]] = deque()

    def forget_pending(self) -> None:
        """No forecast that was made is held against what comes."""
        self._pending.clear()

    def add(self, now_s: float, interval_s: float, mean: float, noise: float, forecast: float) -> None:
        """What is now, with the standard deviation that noise gives it, and what is forecast now."""
        self._pending.append((now_s + self.horizon_s, forecast))
        while self._pending and self._pending[0][0] <= now_s:
            then = self._pending.popleft()[1]
            exceeded = mean > then * (1.0 + self.share) + BOUND_DEVIATIONS * noise
            step = EXCESS_STEP_PER_S * interval_s
            self.share += step * (BOUND_PERCENTILE / 100.0 if exceeded else BOUND_PERCENTILE / 100.0 - 1.0)
            self.share = min(max(self.share, 0.0), MAX_EXCESS)


class Forecaster:
    """Forecasts one rate, of requests or of tokens, from its means over intervals.

    Args:
        horizon_s: over which its errors are learned.
    """

    __slots__ = ("_at_s", "_day", "_excess", "_interval_s", "_last", "_noise", "_unit", "_unix_s", "_windows")

    def __init__(self, horizon_s: float = 120.0) -> None:
        self._excess = Excess(horizon_s)
        self._at_s = 0.0
        self._windows = tuple(WindowMean(window_s) for window_s in WINDOWS_S)
        self._noise = WindowMean(NOISE_WINDOW_S)
        self._day = DailyShape()
        self._last: float | None = None
        self._interval_s = self._unix_s = 0.0
        self._unit = 1.0

    def add(self, rate: float, interval_s: float, unix_s: float, *, unit: float = 1.0) -> None:
        """The mean rate of the interval that ended at `unix_s`.

        Args:
            unit: what one arrival adds to the sum: arrivals are whole, which bounds the noise from below.
        """
        if interval_s <= 0.0:
            return
        if self._last is not None:
            # Half of squared differences of neighbours: a variance that neither trend nor level enters (von Neumann).
            self._noise.add(0.5 * (rate - self._last) ** 2 * interval_s, interval_s)
        for window in self._windows:
            window.add(rate, interval_s)
        self._day.add(rate, interval_s, unix_s)
        self._last, self._unix_s, self._interval_s, self._unit = rate, unix_s, interval_s, unit
        self._at_s += interval_s
        newest = self._windows[0]
        noise = math.sqrt(self.variance_per_s / interval_s * newest.noise_share)
        expected = self.forecast(self._excess.horizon_s).mean
        self._excess.add(self._at_s, interval_s, newest.mean, noise, expected)

    def look_ahead(self, horizon_s: float) -> None:
        """Its errors are learned over another horizon from now on."""
        if horizon_s != self._excess.horizon_s:
            self._excess.horizon_s = horizon_s
            self._excess.forget_pending()

    @property
    def age_s(self) -> float:
        """How much time it has seen."""
        return self._windows[0].age_s

    @property
    def calm(self) -> float:
        """The mean over the longest window, whatever the shorter ones say."""
        return self._windows[-1].mean

    @property
    def variance_per_s(self) -> float:
        """Of the sum that comes, for each second: for Poisson arrivals of equal size, rate times size squared."""
        return max(self._noise.mean, self.calm * self._unit)

    def forecast(self, horizon_s: float) -> Forecast:
        """For the most loaded moment from now until then."""
        if not self._interval_s:
            return Forecast(0.0, 0.0, 0.0)
        variance = self.variance_per_s / self._interval_s
        chosen = self._believed(variance)
        window = self._windows[chosen]
        level = window.mean
        slope = self._slope(chosen)
        ahead_s = window.lag_s + DAMPING_S * (1.0 - math.exp(-horizon_s / DAMPING_S))
        mean = max(level, level + slope * ahead_s)
        season = max(
            (ratio for part in (0.5, 1.0) if (ratio := self._day.ratio(self._unix_s, horizon_s * part)) is not None),
            default=0.0,
        )
        mean = max(mean, level * season, 0.0)
        # Of the mean, not of one interval's sum, whose chance the queueing model knows.
        doubt = BOUND_DEVIATIONS * math.sqrt(variance * window.noise_share)
        upper = mean + math.hypot(doubt, mean * self._excess.share if horizon_s > 0.0 else 0.0)
        return Forecast(mean, upper, level, slope, self._excess.share)

    def _believed(self, variance: float) -> int:
        windows = self._windows
        for place in range(len(windows) - 1, 0, -1):
            mean = windows[place].mean
            limits = (SURPRISE * math.sqrt(variance * shorter.noise_share) for shorter in windows[:place])
            if all(abs(shorter.mean - mean) <= limit for shorter, limit in zip(windows[:place], limits, strict=True)):
                return place
        return 0

    def _slope(self, chosen: int) -> float:
        """Per second; 0 unless the means differ by more than noise."""
        last = len(self._windows) - 1
        if chosen == last or self._windows[last].age_s < 2.0 * WINDOWS_S[0]:
            return 0.0
        slopes = []
        for place in range(chosen, last):
            newer, older = self._windows[place], self._windows[place + 1]
            lag_s = older.lag_s - newer.lag_s
            slopes.append((newer.mean - older.mean) / lag_s if lag_s > 0.0 else 0.0)
        if all(slope > 0.0 for slope in slopes):
            return min(slopes)
        if all(slope < 0.0 for slope in slopes):
            return max(slopes)
        # It turns: where it came from says nothing against where it goes.
        return TURN * slopes[0]
