"""All that is known of one request: how it came to the workers, why to those, and what came of it.

What `slipstream explain REQUEST_ID` shows, and what the processes of a pool tell each other.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from frontend.admission.accounts import AdmissionAccount, AdmissionAccounts
from frontend.decisions import Decision, Decisions


class Explanation(msgspec.Struct, frozen=True):
    """Of one request, or of all that have the id that a client gave; each list in the order of time.

    Attributes:
        unix_s: when it was told.
    """

    unix_s: float
    admissions: list[AdmissionAccount]
    dispatches: list[Decision]

    def __bool__(self) -> bool:
        return bool(self.admissions or self.dispatches)


Explains = Callable[[str], Awaitable[Explanation]]
"""What is known of a request, here or elsewhere."""


class Explainer:
    """What this process knows."""

    def __init__(
        self,
        decisions: Decisions | None = None,
        accounts: AdmissionAccounts | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._decisions = Decisions() if decisions is None else decisions
        self._accounts = AdmissionAccounts() if accounts is None else accounts
        self._wall_clock = wall_clock

    def of(self, request_id: str) -> Explanation:
        """What is known of a request now."""
        return Explanation(self._wall_clock(), self._accounts.of(request_id), self._decisions.of(request_id))

    async def find(self, request_id: str) -> Explanation:
        """`Explains`."""
        return self.of(request_id)


def joined(parts: Iterable[Explanation]) -> Explanation:
    """Several processes' knowledge of the same request."""
    known = list(parts)
    return Explanation(
        max((one.unix_s for one in known), default=0.0),
        sorted((one for each in known for one in each.admissions), key=lambda one: one.unix_s),
        sorted((one for each in known for one in each.dispatches), key=lambda one: one.unix_s),
    )
