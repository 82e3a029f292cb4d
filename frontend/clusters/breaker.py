"""Whether one frontend of a cluster may be sent requests, by how the last ones went. Pure: the time is passed in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FAILURES_TO_OPEN = 3
"""Requests that failed one after the other; one that found nobody there is enough."""

FIRST_OPEN_S = 1.0
MAX_OPEN_S = 30.0


class Health(Enum):
    """UP takes all, PROBE one request at a time, DOWN none as long as there is another."""

    UP = "up"
    PROBE = "probe"
    DOWN = "down"


@dataclass(slots=True)
class Breaker:
    """A circuit breaker: closed, open for a while, then half open until a request has gone well."""

    failures: int = 0
    open_until_s: float = 0.0
    strikes: int = 0
    probing: int = 0

    def health(self, now_s: float) -> Health:
        if not self.strikes:
            return Health.UP
        if now_s < self.open_until_s or self.probing:
            return Health.DOWN
        return Health.PROBE

    def failed(self, now_s: float, *, unreachable: bool) -> None:
        """A request failed in a way for which it is not to blame."""
        self.failures += 1
        if not unreachable and self.failures < FAILURES_TO_OPEN and not self.strikes:
            return
        if self.strikes and now_s < self.open_until_s:
            return  # those that failed together are one failure
        self.strikes += 1
        self.open_until_s = now_s + min(FIRST_OPEN_S * 2.0 ** min(self.strikes - 1, 16), MAX_OPEN_S)

    def succeeded(self) -> None:
        """A request began to be answered."""
        self.failures, self.strikes, self.open_until_s = 0, 0, 0.0
