"""What this frontend knows of the workers.

`ClusterView` is the pure part: sets from the registry and failed calls go in with the time, candidates for the
router come out. `ClusterWatch` is the loop around it that follows the registry. The registry may be gone for
as long as it likes: the last view stays, and workers that fail are avoided by what this frontend saw itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from frontend.dispatch_metrics import REGISTRY_CONNECTED, WORKERS
from slipstream import registry_watch, telemetry
from slipstream.errors import DeadlineError
from slipstream.registry_watch import RegistryView
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerSet, WorkerState

log = telemetry.get_logger(__name__)

FIRST_PENALTY_S = 3.0
MAX_PENALTY_S = 30.0
RENEWALS_THAT_PROVE_LIFE = 2
"""One renewal may have been on its way when the call failed; the second was sent after it."""


@dataclass(slots=True)
class _Suspicion:
    epoch: int
    renewals: int
    until_s: float
    strikes: int


@dataclass(slots=True)
class ClusterView(RegistryView):
    """Pure state. `now_s` is in seconds of a clock that never goes backwards."""

    _suspicions: dict[str, _Suspicion] = field(default_factory=dict)

    def apply(self, workers: WorkerSet) -> None:
        """Take a registry's set. Until the registry is settled, workers that it has not heard of yet are kept."""
        RegistryView.apply(self, workers)  # `super()` knows the class from before it got its slots
        for worker_id in self._suspicions.keys() - self._records.keys():
            del self._suspicions[worker_id]

    def suspect(self, worker_id: str, epoch: int, now_s: float) -> None:
        """A call to this incarnation failed as if nobody were there: avoid it for a while.

        A first suspicion ends when the worker is seen to renew its registration. A worker that fails again
        although it renews cannot be reached from here: only time helps, twice as long with each failure.
        """
        record = self._records.get(worker_id)
        if record is None or record.epoch != epoch:
            return
        before = self._suspicions.get(worker_id)
        strikes = 1
        if before is not None and before.epoch == epoch:
            # Calls that failed together are one failure.
            strikes = before.strikes if self.is_suspect(worker_id, now_s) else before.strikes + 1
        penalty_s = min(FIRST_PENALTY_S * 2 ** (strikes - 1), MAX_PENALTY_S)
        self._suspicions[worker_id] = _Suspicion(epoch, record.renewals, now_s + penalty_s, strikes)

    def absolve(self, worker_id: str) -> None:
        """A call to this worker went well."""
        self._suspicions.pop(worker_id, None)

    def is_suspect(self, worker_id: str, now_s: float) -> bool:
        suspicion, record = self._suspicions.get(worker_id), self._records.get(worker_id)
        if suspicion is None or record is None or record.epoch != suspicion.epoch:
            return False
        renewed = record.renewals >= suspicion.renewals + RENEWALS_THAT_PROVE_LIFE
        return now_s < suspicion.until_s and not (renewed and suspicion.strikes == 1)

    def is_this(self, worker_id: str, epoch: int) -> bool:
        """Whether the worker of that id is this incarnation, as far as is known."""
        record = self._records.get(worker_id)
        return record is None or record.epoch == epoch

    def suspects(self, now_s: float) -> frozenset[str]:
        """Workers that are suspect now."""
        return frozenset(worker_id for worker_id in self._suspicions if self.is_suspect(worker_id, now_s))

    def ready(self, role: Role.ValueType, now_s: float) -> list[WorkerRecord]:
        """Workers of a role that take requests now."""
        return [
            record
            for record in self._records.values()
            if record.role == role
            and record.state == WorkerState.READY
            and not self.is_suspect(record.worker_id, now_s)
        ]


class ClusterWatch:
    """Follows the registry and keeps `view` up to date; `follow` must run for that.

    Args:
        on_change: awaited after each set was taken into the view.
    """

    def __init__(
        self,
        registry_address: str,
        *,
        clock: Callable[[], float],
        on_change: Callable[[ClusterView], Awaitable[None]],
    ) -> None:
        self.view = ClusterView()
        self._address = registry_address
        self._clock = clock
        self._on_change = on_change
        self._changed = asyncio.Condition()
        self._connected: bool | None = None

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until a decode worker is ready.

        Raises:
            DeadlineError: none was within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.view.ready(Role.ROLE_DECODE, self._clock()))
        except TimeoutError as error:
            raise DeadlineError(f"no decode worker became ready within {timeout_s:g} s") from error

    async def follow(self) -> None:
        """Watch, and watch again after every failure. Runs until cancelled."""
        await registry_watch.follow(self._address, take=self._take, lost=self._note_lost)

    async def _take(self, workers: WorkerSet) -> None:
        self.view.apply(workers)
        self._note_connected()
        await self._on_change(self.view)
        async with self._changed:
            self._changed.notify_all()

    def _note_connected(self) -> None:
        REGISTRY_CONNECTED.set(1)
        counts = {(role, state): 0 for role in Role.values() if role for state in WorkerState.values() if state}
        for record in self.view.records():
            counts[record.role, record.state] = counts.get((record.role, record.state), 0) + 1
        for (role, state), count in counts.items():
            WORKERS.labels(Role.Name(role).removeprefix("ROLE_").lower(), WorkerState.Name(state).lower()).set(count)
        if self._connected is not True:
            log.info("registry_connected", registry=self._address, workers=len(self.view.records()))
        self._connected = True

    def _note_lost(self, reason: str) -> None:
        REGISTRY_CONNECTED.set(0)
        if self._connected is not False:
            log.warning("registry_lost", registry=self._address, reason=reason, workers=len(self.view.records()))
        self._connected = False
