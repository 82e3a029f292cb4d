"""What was too little once: a bar against going back there under the same load.

An estimate that lies between two counts crosses their border with every chance of arrivals. Without a memory a planner
would follow it up and down (Dynamo's pull request 9294 tells of 2, 1, 2, 1). With it, the load must first be clearly
less than when the larger count was needed: a Schmitt trigger, whose band is wider than the estimate's noise.
"""

from __future__ import annotations

from planner.scaling import Counts

BAND, CALM_BAND = 0.85, 0.95
"""Of the load at which more was needed: below it, the smaller count may be tried again. The second where all has
gone well for so long that what is late again would be borne (`planner.caution`)."""
REMEMBER_S = 7200.0


class Bars:
    """One model's."""

    __slots__ = ("_decode", "_prefill")

    def __init__(self) -> None:
        self._prefill: dict[int, tuple[float, float]] = {}
        self._decode: dict[int, tuple[float, float]] = {}

    def set(self, before: Counts, wanted: Counts, load: tuple[float, float], at_s: float) -> None:
        """These counts were too few for that load of prompt and of answer tokens per second."""
        if wanted.prefill > before.prefill:
            self._prefill[before.prefill] = (at_s, load[0])
        if wanted.decode > before.decode:
            self._decode[before.decode] = (at_s, load[1])

    def least(self, load: tuple[float, float], at_s: float, band: float = BAND) -> Counts:
        """The fewest workers that may be tried at this load."""
        return Counts(_least(self._prefill, load[0], at_s, band), _least(self._decode, load[1], at_s, band))


def _least(bars: dict[int, tuple[float, float]], load: float, at_s: float, band: float) -> int:
    for count, (set_s, _) in list(bars.items()):
        if at_s - set_s > REMEMBER_S:
            del bars[count]
    return max((count + 1 for count, (_, then) in bars.items() if load > band * then), default=0)
