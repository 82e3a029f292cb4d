"""How much room to leave beyond what is expected, learned from how many requests are late.

An objective of 99% allows one late request in a hundred. Where none is late for long, the model was too careful for
this load, and fewer workers would do; where more are, it was not careful enough. Each late request makes the planner
more careful and each one in time a little less, in the proportion that the objective allows: an integral controller on
the objective itself, whatever the model gets wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.bars import BAND, CALM_BAND
from planner.demand import Demand
from planner.forecast import FIRST_EXCESS, Forecast
from planner.objectives import Objective
from planner.observation import Traffic

FIRST = 0.2
STEP = 0.2
"""Five late requests beyond what the objective allows are a whole step."""
UNSURE = 0.0
"""The least level where forecasts have gone wrong lately: a load that has jumped jumps again. Keeping some of the
bound there (0.3) cost 2 to 4% and saved no request on any load of `benchmarks.planner`."""
TRUST = 0.1
"""By how much at most less is prepared for than is expected, after some hundred requests in time."""
SAVED = 4.0
"""What was in time beyond the objective can be lost again before anything changes: so many steps at most."""
PATIENCE = 0.07
MARGIN = 0.1
"""What survivors must bear beyond it, at full caution, before any worker is let go."""


class Caution:
    """One model's.

    Attributes:
        level: 1: all of the forecast's bound is prepared for; 0: what is expected; -1 and below: a tenth less.
    """

    __slots__ = ("level",)

    def __init__(self) -> None:
        self.level = FIRST

    def add(self, traffic: Mapping[str, Traffic], objectives: Mapping[str, Objective]) -> None:
        """What one interval answered, by class."""
        for name, objective in objectives.items():
            part = traffic.get(name)
            if part is None:
                continue
            lost = part.refused + part.failed
            late = len(part.ttft) * (1.0 - part.ttft.share_within(objective.ttft_s)) + lost
            slow = len(part.itl) * (1.0 - part.itl.share_within(objective.itl_s))
            allowed = (1.0 - objective.percentile / 100.0) * (len(part.ttft) + lost)
            self.level = min(max(self.level + STEP * (max(late, slow) - allowed), -SAVED), 1.0)

    def prepared(self, demand: Demand, forecast: Forecast) -> Demand:
        """The demand at the rate that is prepared for."""
        # Where forecasts go wrong, what went well says little about what comes.
        level = max(self.level, UNSURE) if forecast.excess > FIRST_EXCESS else self.level
        if level >= 0.0:
            return demand.at(forecast.mean + level * (forecast.upper - forecast.mean))
        return demand.at(forecast.mean * (1.0 + TRUST * max(level, -1.0)))

    @property
    def backlog_share(self) -> float:
        """Of the TTFT limit, what may wait at each worker without being called a backlog."""
        return 0.6 - 0.3 * max(self.level, -1.0)

    def patience(self, excess: float) -> float:
        """Factor on the load under which one more worker is wanted.

        What was let go because all went well is not called back by the model's word, but by requests that are late or
        by a load that is clearly more: else an estimate between two counts would go back and forth.
        """
        return 1.0 if excess > FIRST_EXCESS else 1.0 - PATIENCE * min(max(-self.level, 0.0), 1.0)

    @property
    def band(self) -> float:
        """Of the load at which a count was too small, below which it may be tried again: more while all goes well."""
        return BAND + (CALM_BAND - BAND) * min(max(-self.level, 0.0), 1.0)

    @property
    def alarmed(self) -> bool:
        """Whether more requests have been late than an objective allows."""
        return self.level >= 1.0

    @property
    def margin(self) -> float:
        """Factor on the load under which survivors are checked."""
        return 1.0 + MARGIN * max(0.0, self.level)
