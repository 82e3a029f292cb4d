"""Where workers come from: the few things a planner asks of what runs them.

Local processes, Ray and Kubernetes fit behind it: the planner knows nothing of them, and they nothing of the planner. A
scaler keeps no state that matters: what it runs, it finds again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from slipstream.v1.registry_pb2 import Role


@dataclass(frozen=True, slots=True)
class ScaledWorker:
    """A worker that a scaler runs, ready or not.

    Attributes:
        worker_id: its name in the registry, known from the start on.
        ending: it was asked to drain.
    """

    worker_id: str
    model: str
    role: Role.ValueType
    started_s: float
    ending: bool = False


@dataclass(frozen=True, slots=True)
class SickWorker:
    """A worker that was found to be sick, as whoever owns its machine hears of it.

    Attributes:
        node: of Kubernetes or Ray, that it runs on; empty where it was not told.
        device_ids: NVML's UUIDs of its GPUs.
        device: its device is what is wrong: nothing new is to be put there.
        reasons: for people, the gravest first.
    """

    worker_id: str
    node: str
    device_ids: tuple[str, ...]
    device: bool
    reasons: tuple[str, ...]


@runtime_checkable
class Reporter(Protocol):
    """What a scaler may be besides: somebody who can keep new work off a sick machine, and tell its owner."""

    async def report(self, sick: SickWorker) -> None:
        """Tell of a sick worker; told again: nothing. Has a deadline, and fails with a `SlipstreamError`."""
        ...


class Scaler(Protocol):
    """Starts, drains and flips workers. Every call has a deadline of its own, and fails with a `SlipstreamError`."""

    async def workers(self) -> Sequence[ScaledWorker]:
        """All that it runs now, also what another planner had it start."""
        ...

    async def start(self, model: str, role: Role.ValueType) -> str:
        """Have a worker started; returns its worker id at once. It registers itself when it is ready.

        Raises:
            UnavailableError: there is no room for another.
        """
        ...

    async def drain(self, worker_id: str) -> str:
        """Ask a worker to finish what it has and end; returns at once. Asked again, or of one that is gone: nothing.

        Returns:
            The worker that ends: another of the same pool where what runs them decides which one goes.
        """
        ...

    async def flip(self, worker_id: str, role: Role.ValueType) -> None:
        """Give a worker the other role without a restart; returns once it has taken it.

        Raises:
            UnavailableError: it cannot be reached, or is ending.
        """
        ...

    async def hold_lease(self, holder: str, lease_s: float) -> bool:
        """Take or renew the one planner's lease; False while another holds it. Whoever stops renewing loses it."""
        ...

    async def release_lease(self, holder: str) -> None:
        """Let another take it at once."""
        ...
