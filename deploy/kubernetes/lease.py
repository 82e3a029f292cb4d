"""Which planner may act: a Lease object, held as Kubernetes' own components hold theirs.

Clocks of different machines are never compared. Whoever waits watches the object: when it has not changed for as long
as it says that it lasts, by the watcher's own clock, its holder is taken to be gone. Every write names the version that
it read, so that of two that try at the same time one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from deploy.kubernetes.api import LEASES, KubernetesApi, Object
from deploy.kubernetes.errors import ConflictError, ObjectMissingError


@dataclass(slots=True)
class LeaseWatch:
    """What was seen of a lease, and since when it has been so. Pure: the time is passed in."""

    seen: tuple[object, ...] = ()
    since_s: float = 0.0

    def look(self, spec: Mapping[str, Any], now_s: float) -> None:
        """It is like this now."""
        seen = tuple(spec.get(name) for name in ("holderIdentity", "renewTime", "acquireTime", "leaseTransitions"))
        if seen != self.seen:
            self.seen, self.since_s = seen, now_s

    def held_by_another(self, spec: Mapping[str, Any], holder: str, now_s: float) -> bool:
        """Whether somebody else has it, and has been heard of lately."""
        other = spec.get("holderIdentity") or ""
        return other not in ("", holder) and now_s < self.since_s + float(spec.get("leaseDurationSeconds") or 0)


class PlannerLease:
    """The Lease of that name.

    Args:
        clock: seconds that never go backwards.
        utc: for people who look at the object.
    """

    def __init__(
        self,
        api: KubernetesApi,
        name: str,
        *,
        clock: Callable[[], float],
        utc: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._name = name
        self._clock = clock
        self._utc = utc
        self._watch = LeaseWatch()

    async def hold(self, holder: str, lease_s: float) -> bool:
        """Take or renew it; False while another has it.

        Raises:
            KubernetesError
        """
        while True:
            found = await self._read()
            try:
                if found is None:
                    await self._create(holder, lease_s)
                    return True
                spec = found.get("spec") or {}
                self._watch.look(spec, self._clock())
                if self._watch.held_by_another(spec, holder, self._clock()):
                    return False
                await self._write(found, self._spec(spec, holder, lease_s))
            except ConflictError:  # somebody was quicker: look who
                continue
            return True

    async def release(self, holder: str) -> None:
        """Let another take it at once; whoever has it not gives nothing away.

        Raises:
            KubernetesError
        """
        found = await self._read()
        spec = (found or {}).get("spec") or {}
        if found is None or spec.get("holderIdentity") != holder:
            return
        try:
            await self._write(found, {**spec, "holderIdentity": "", "leaseDurationSeconds": 1})
        except ConflictError:  # it has another holder by now
            return

    async def _read(self) -> Object | None:
        try:
            return await self._api.call("get", LEASES, self._name)
        except ObjectMissingError:
            return None

    async def _create(self, holder: str, lease_s: float) -> None:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": self._spec({}, holder, lease_s),
        }
        await self._api.call("create", LEASES, body=body)

    async def _write(self, found: Object, spec: Mapping[str, Any]) -> None:
        # With metadata.resourceVersion as it was read. Done twice, the second is a conflict, which is looked into.
        await self._api.call("update", LEASES, self._name, body={**found, "spec": spec})

    def _spec(self, before: Mapping[str, Any], holder: str, lease_s: float) -> Mapping[str, Any]:
        now = self._utc().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kept = before.get("holderIdentity") == holder
        transitions = int(before.get("leaseTransitions") or 0)
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": math.ceil(lease_s),
            "acquireTime": before.get("acquireTime", now) if kept else now,
            "renewTime": now,
            "leaseTransitions": transitions + (not kept and bool(before)),
        }
