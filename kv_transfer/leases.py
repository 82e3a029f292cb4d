"""The prefill service's view of its board: opens leases, renews them, releases them, sees how they ended.

A lease is opened before the engine knows of the request, so that a release always has a place to be written:
whatever the engine is doing when the caller goes away, it finds the release and frees the blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from kv_transfer.board import Board, Outcome, Word, new_nonce
from slipstream.errors import UnavailableError

# Well after this the engine has certainly closed a lease that it ever saw.
_ABANDONED_AFTER_LEASES = 3.0


@dataclass(slots=True)
class Lease:
    """One open lease. `seen_by_engine` is set once the request was handed to the engine."""

    slot: int
    nonce: int
    opened_s: float
    seen_by_engine: bool = False
    closed: bool = False


class LeaseTable:
    """Owns the slots of one board.

    Args:
        lease_s: how long blocks are held after the last renewal.
    """

    def __init__(self, board: Board, *, lease_s: float) -> None:
        self._board = board
        self._lease_s = lease_s
        self._free = list(range(board.slots - 1, -1, -1))
        self._closing: list[Lease] = []
        self._open = 0

    @property
    def open_count(self) -> int:
        return self._open

    def open(self) -> Lease:
        """Take a slot.

        Raises:
            UnavailableError: every slot is taken (`transfer.board_slots`).
        """
        if not self._free:
            self._reclaim()
        if not self._free:
            raise UnavailableError(
                f"all {self._board.slots} handoff slots (transfer.board_slots) of this worker are taken",
                code="worker_busy",
                retry_after_s=1.0,
            )
        slot = self._free.pop()
        lease = Lease(slot, new_nonce(), time.monotonic())
        self._board.put(slot, Word.OUTCOME, 0)
        self.renew(lease)
        self._open += 1
        return lease

    def renew(self, lease: Lease) -> None:
        """Hold the blocks for another lease period from now."""
        self._board.put(lease.slot, Word.DEADLINE, time.monotonic_ns() + int(self._lease_s * 1e9))

    def outcome(self, lease: Lease) -> Outcome | None:
        """How the lease ended; None while it is open."""
        return self._board.outcome(lease.slot, lease.nonce)

    def close(self, lease: Lease) -> None:
        """Give the lease up (again is fine). The engine frees the blocks in its next step."""
        if lease.closed:
            return
        lease.closed = True
        self._open -= 1
        self._board.put(lease.slot, Word.RELEASED, lease.nonce)
        self._closing.append(lease)
        self._reclaim()

    def _reclaim(self) -> None:
        """Take back slots whose leases have ended on both sides."""
        oldest_s = time.monotonic() - _ABANDONED_AFTER_LEASES * self._lease_s
        waiting = []
        for lease in self._closing:
            ended = not lease.seen_by_engine or self.outcome(lease) is not None
            abandoned = lease.opened_s < oldest_s and self._board.get(lease.slot, Word.HELD) != lease.nonce
            if ended or abandoned:
                self._free.append(lease.slot)
            else:
                waiting.append(lease)
        self._closing = waiting
