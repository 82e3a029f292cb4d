"""How much work each worker has before it, as this frontend best knows.

A worker's own figures are a second old; this frontend's are exact but leave out what others send. Here the two
are joined without counting the same request twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.v1.registry_pb2 import WorkerRecord

FOREIGN_PROMPT_TOKENS = 512
"""What a request of another frontend is taken to be worth on a prefill worker, whose record counts requests only."""


@dataclass(frozen=True, slots=True)
class Outstanding:
    """Work before a worker: requests, and prompt tokens that it has yet to compute."""

    requests: int = 0
    prompt_tokens: int = 0


@dataclass(slots=True)
class _Account:
    requests: int = 0
    prompt_tokens: int = 0
    peak_requests: int = 0  # since the last record: all of these may be in the worker's next figures
    foreign_requests: int = 0
    epoch: int = 0
    renewals: int = -1


class OutstandingWork:
    """This frontend's own requests by worker, and its estimate of everybody else's. Plain data: no clock, no I/O."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def begin(self, worker_id: str, prompt_tokens: int) -> None:
        """A request was sent to a worker. Pair each with one `end`."""
        account = self._accounts.setdefault(worker_id, _Account())
        account.requests += 1
        account.prompt_tokens += prompt_tokens
        account.peak_requests = max(account.peak_requests, account.requests)

    def end(self, worker_id: str, prompt_tokens: int) -> None:
        """A request sent with `begin` no longer burdens the worker."""
        account = self._accounts[worker_id]
        assert account.requests > 0, f"more requests ended on {worker_id} than began"
        account.requests -= 1
        account.prompt_tokens -= prompt_tokens

    def note(self, record: WorkerRecord) -> None:
        """A worker's own figures arrived: what it has beyond this frontend's requests is others' work."""
        account = self._accounts.setdefault(record.worker_id, _Account())
        if (account.epoch, account.renewals) == (record.epoch, record.renewals):
            return
        account.epoch, account.renewals = record.epoch, record.renewals
        registered = record.load.running + record.load.waiting
        account.foreign_requests = max(0, registered - account.peak_requests)
        account.peak_requests = account.requests

    def forget_all_but(self, worker_ids: set[str]) -> None:
        """Drop the accounts of workers that are gone and have no open request here."""
        for worker_id in [name for name, account in self._accounts.items() if not account.requests]:
            if worker_id not in worker_ids:
                del self._accounts[worker_id]

    def of(self, worker_id: str) -> Outstanding:
        """The estimate for one worker; nothing for an unknown one."""
        account = self._accounts.get(worker_id)
        if account is None:
            return Outstanding()
        return Outstanding(
            requests=account.requests + account.foreign_requests,
            prompt_tokens=account.prompt_tokens + account.foreign_requests * FOREIGN_PROMPT_TOKENS,
        )
