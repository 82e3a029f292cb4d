"""Which workers there are: soft state under leases, pure data with the time passed in.

A worker sends its whole record and sends it again before its lease ends; whoever falls silent is forgotten.
Nothing else is remembered, so that a restarted registry is complete after one lease period (`settled`).

Two incarnations of one worker id never fight: the larger epoch wins, and an incarnation that took its leave
cannot come back through a renewal that was still on its way.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from slipstream.errors import InvalidRequestError, UnavailableError
from slipstream.v1.registry_pb2 import WorkerRecord

MAX_WORKERS = 4096
"""Far above any cluster this is meant for; without a bound a broken client could fill the memory."""


class Change(enum.IntEnum):
    """How much of what watchers see changed, least first."""

    NOTHING = 0
    LOAD = 1  # load, renewals or measured paths alone: watchers may learn of it a little later
    WORKERS = 2  # who is there, in which state: watchers learn of it at once


@dataclass(slots=True)
class _Lease:
    record: WorkerRecord
    expires_at_s: float


@dataclass(slots=True)
class _Farewell:
    epoch: int
    forget_at_s: float


@dataclass(slots=True)
class Registry:
    """The soft state. Every method takes `now_s`, seconds of a clock that never goes backwards.

    Attributes:
        lease_s: how long a record is believed without renewal.
        started_at_s: when this registry began to listen.
    """

    lease_s: float
    started_at_s: float
    max_workers: int = MAX_WORKERS
    _leases: dict[str, _Lease] = field(default_factory=dict)
    _farewells: dict[str, _Farewell] = field(default_factory=dict)
    _advanced_to_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._advanced_to_s = self.started_at_s

    def register(self, record: WorkerRecord, now_s: float) -> Change:
        """Take a worker in, or renew its lease with its newest record. The record is kept, not copied.

        Raises:
            InvalidRequestError: (code `stale_epoch`) a newer incarnation is registered, or this one has left.
            UnavailableError: (code `registry_full`) there are `max_workers` others.
        """
        known = self._leases.get(record.worker_id)
        self._refuse_stale(record, known)
        if known is None and len(self._leases) >= self.max_workers:
            raise UnavailableError(
                f"the registry holds {len(self._leases)} workers, its limit is {self.max_workers}",
                code="registry_full",
                retry_after_s=self.lease_s,
            )
        self._farewells.pop(record.worker_id, None)
        self._leases[record.worker_id] = _Lease(record, now_s + self.lease_s)
        return Change.WORKERS if known is None else _difference(known.record, record)

    def deregister(self, worker_id: str, epoch: int, now_s: float) -> Change:
        """Let a worker go. An older incarnation than the registered one changes nothing.

        The farewell is remembered for one lease period, also of a worker that is not known (yet).
        """
        known = self._leases.get(worker_id)
        if known is not None and known.record.epoch > epoch:
            return Change.NOTHING
        self._remember_farewell(worker_id, epoch, now_s)
        if known is None:
            return Change.NOTHING
        del self._leases[worker_id]
        return Change.WORKERS

    def advance(self, now_s: float) -> tuple[WorkerRecord, ...]:
        """Forget the leases that ended by `now_s`; call it often. Returns the records forgotten.

        When the last call is longer ago than half a lease, it was this process that slept (a stopped process,
        a suspended laptop), not the workers: all leases begin anew and the registry is unsettled again.
        """
        asleep = now_s - self._advanced_to_s > max(self.lease_s / 2, 1.0)
        self._advanced_to_s = now_s
        if asleep:
            self._begin_anew(now_s)
            return ()
        gone = [lease.record for lease in self._leases.values() if lease.expires_at_s <= now_s]
        for record in gone:
            del self._leases[record.worker_id]
        for worker_id in [name for name, left in self._farewells.items() if left.forget_at_s <= now_s]:
            del self._farewells[worker_id]
        return tuple(gone)

    def settled(self, now_s: float) -> bool:
        """Whether every living worker had the time to register: one lease period has passed."""
        return now_s - self.started_at_s >= self.lease_s

    def records(self) -> list[WorkerRecord]:
        """All workers believed to be alive, ordered by id. Not copies: do not change them."""
        return [self._leases[worker_id].record for worker_id in sorted(self._leases)]

    def _refuse_stale(self, record: WorkerRecord, known: _Lease | None) -> None:
        left = self._farewells.get(record.worker_id)
        if known is not None and record.epoch < known.record.epoch:
            reason = f"epoch {known.record.epoch} of this worker is registered"
        elif left is not None and record.epoch <= left.epoch:
            reason = f"epoch {left.epoch} of this worker has taken its leave"
        else:
            return
        raise InvalidRequestError(
            f"worker {record.worker_id} came with epoch {record.epoch}, but {reason}; "
            "give each process its own worker id",
            param="epoch",
            code="stale_epoch",
        )

    def _remember_farewell(self, worker_id: str, epoch: int, now_s: float) -> None:
        left = self._farewells.get(worker_id)
        if left is None and len(self._farewells) >= self.max_workers:
            return
        epoch = max(epoch, left.epoch) if left else epoch
        self._farewells[worker_id] = _Farewell(epoch, now_s + self.lease_s)

    def _begin_anew(self, now_s: float) -> None:
        self.started_at_s = now_s
        for lease in self._leases.values():
            lease.expires_at_s = now_s + self.lease_s


def _difference(before: WorkerRecord, after: WorkerRecord) -> Change:
    if _identity(before) != _identity(after):
        return Change.WORKERS
    if before.load != after.load or before.renewals != after.renewals or before.paths != after.paths:
        return Change.LOAD
    return Change.NOTHING


def _identity(record: WorkerRecord) -> tuple[object, ...]:
    capacity, transfer = record.capacity, record.transfer
    return (
        record.epoch,
        record.state,
        record.role,
        record.model,
        record.address,
        record.host_id,
        record.metrics_url,
        record.device,
        record.pid,
        record.started_unix_s,
        (capacity.max_model_len, capacity.block_tokens, capacity.blocks, capacity.block_bytes),
        (transfer.address, transfer.epoch, transfer.public_key, *transfer.transports, *transfer.ranks),
    )
