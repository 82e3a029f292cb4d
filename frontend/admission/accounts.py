"""What admission did with the last requests: the first part of the answer to `slipstream explain REQUEST_ID`.

Bounded, in memory and each process's own, as `frontend.decisions` is.
"""

from __future__ import annotations

import msgspec

from frontend.admission.claim import Claim
from frontend.last_requests import KEPT, LastRequests
from slipstream.errors import SlipstreamError

WAITING = "waiting"
ADMITTED = "admitted"
LEFT = "left"


class AdmissionAccount(msgspec.Struct, kw_only=True):
    """One sequence at the gate.

    Attributes:
        unix_s: when it came.
        state: `waiting`, `admitted`, `left` (its client went while it waited, or its time was over), or the code of
            the error that it got.
        since_unix_s: since when it has been in that state.
        waited_s: in the queue, all its waits together, without one that is not over.
        preemptions: times it was taken from the workers, to wait again.
        retry_after_s: what one that was refused was told.
    """

    request_id: str
    unix_s: float
    service_class: str
    tenant: str
    state: str = WAITING
    since_unix_s: float = 0.0
    waited_s: float = 0.0
    preemptions: int = 0
    retry_after_s: float | None = None

    def admitted(self, waited_s: float, unix_s: float) -> None:
        """Its turn has come."""
        self.state, self.since_unix_s = ADMITTED, unix_s
        self.waited_s += waited_s

    def preempted(self, unix_s: float) -> None:
        """It was taken from the workers."""
        self.state, self.since_unix_s = WAITING, unix_s
        self.preemptions += 1

    def left(self, waited_s: float, unix_s: float) -> None:
        """It ended before its turn came."""
        self.state, self.since_unix_s = LEFT, unix_s
        self.waited_s += waited_s

    def refused(self, error: SlipstreamError, waited_s: float, unix_s: float) -> None:
        """It will not have its turn."""
        self.state, self.since_unix_s = error.code, unix_s
        self.waited_s += waited_s
        self.retry_after_s = error.retry_after_s


class AdmissionAccounts:
    """The last ones. Those that were refused are kept apart, so that a flood of them does not drive out the others."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._let_in: LastRequests[AdmissionAccount] = LastRequests(kept)
        self._refused: LastRequests[AdmissionAccount] = LastRequests(kept)

    def open(self, request_id: str, claim: Claim, unix_s: float) -> AdmissionAccount:
        """A request has come."""
        account = AdmissionAccount(
            request_id=request_id,
            unix_s=unix_s,
            service_class=claim.priority.label,
            tenant=claim.tenant,
            since_unix_s=unix_s,
        )
        self._let_in.add(request_id, account)
        return account

    def refused(self, account: AdmissionAccount) -> None:
        """It was."""
        self._let_in.forget(account.request_id)
        self._refused.add(account.request_id, account)

    def of(self, request_id: str) -> list[AdmissionAccount]:
        """Of a request; see `LastRequests.of`."""
        return [*self._let_in.of(request_id), *self._refused.of(request_id)]
