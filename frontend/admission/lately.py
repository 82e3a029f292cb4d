"""Who has used how much of the prefill workers lately: sums that decay, so that what was long ago does not count."""

from __future__ import annotations

import math

from frontend.admission.claim import Entry

LATELY_S = 10.0
"""Use so long ago weighs 1/e of use now."""

_FORGOTTEN = 1e-3
_LONGEST_S = 1.0
"""Of a time in which nobody looked, no more than this counts."""

_MAX_TENANTS = 4096
COMPANY_S = 60.0
"""After a request of another tenant or class, for so long somebody is there to be fair to."""


class Decaying:
    """A sum whose parts fade: of a steady stream it is `LATELY_S` times the rate."""

    __slots__ = ("_at_s", "_sum")

    def __init__(self, now_s: float) -> None:
        self._sum, self._at_s = 0.0, now_s

    def add(self, amount: float, now_s: float) -> None:
        self._sum = self.of(now_s) + amount
        self._at_s = now_s

    def of(self, now_s: float) -> float:
        return self._sum * math.exp((self._at_s - now_s) / LATELY_S)


class Company:
    """Whether all that comes is of one tenant and class, so that nobody loses by what waits at the workers."""

    __slots__ = ("_last", "_until_s")

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None
        self._until_s = -math.inf

    def came(self, entry: Entry, now_s: float) -> None:
        """A new request."""
        whose = entry.claim.tenant, int(entry.claim.priority)
        if whose != self._last:
            if self._last is not None:
                self._until_s = now_s + COMPANY_S
            self._last = whose

    def none_at(self, now_s: float) -> bool:
        """Whether nobody else has come lately."""
        return now_s >= self._until_s


class Lately:
    """Prompt work that this frontend sent, by tenant, and the time for which it and others kept workers busy."""

    def __init__(self, now_s: float) -> None:
        self._work: dict[str, Decaying] = {}
        self._all_work = Decaying(now_s)
        self._own, self._foreign = Decaying(now_s), Decaying(now_s)
        self._at_s = now_s

    def sent(self, entry: Entry, now_s: float) -> None:
        """A prompt goes to the workers."""
        tenant = entry.claim.tenant
        work = self._work.get(tenant)
        if work is None:
            if len(self._work) >= _MAX_TENANTS:
                self._work = {name: one for name, one in self._work.items() if one.of(now_s) > _FORGOTTEN}
            work = self._work[tenant] = Decaying(now_s)
        work.add(entry.prompt_work, now_s)
        self._all_work.add(entry.prompt_work, now_s)

    def passed(self, own_workers: int, foreign_workers: int, now_s: float) -> None:
        """Until now so many workers had prompts of this frontend, and so many had prompts of others."""
        passed_s = min(max(0.0, now_s - self._at_s), _LONGEST_S)
        self._own.add(own_workers * passed_s, now_s)
        self._foreign.add(foreign_workers * passed_s, now_s)
        self._at_s = max(self._at_s, now_s)

    def tenant_is_below(self, tenant: str, part: float, now_s: float) -> bool:
        """Whether a tenant had less than its part of what this frontend sent."""
        work = self._work.get(tenant)
        return work is None or work.of(now_s) < part * self._all_work.of(now_s)

    def frontend_is_below(self, part: float, now_s: float) -> bool:
        """Whether this frontend had less than its part of the workers' time."""
        own = self._own.of(now_s)
        return own < part * (own + self._foreign.of(now_s))
