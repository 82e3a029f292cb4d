"""The planner's scaler on Kubernetes: pools are Deployments, workers are their pods, seats are `spec.replicas`.

Or pools are LeaderWorkerSets, and workers their groups. A worker's id is the name of its pod, or of its group's leader.
What is not in the API server's objects is not known: any planner can go on from there.
`docs/deploy/kubernetes-scaler.md` tells how pods are chosen, and what happens when something fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from deploy.kubernetes.api import DEPLOYMENTS, LEADER_WORKER_SETS, PODS, KubernetesApi, Object
from deploy.kubernetes.connection import connected
from deploy.kubernetes.errors import ConflictError, KubernetesError, ObjectMissingError
from deploy.kubernetes.groups import members
from deploy.kubernetes.lease import PlannerLease
from deploy.kubernetes.objects import (
    DELETION_COST_ANNOTATION,
    DRAINING_ANNOTATION,
    SICK_ANNOTATION,
    Pod,
    Pool,
    pods_of,
    pools_of,
)
from deploy.kubernetes.seats import add_seats
from deploy.kubernetes.taints import keep_off
from deploy.kubernetes.victims import LEAST_COST, goes_first
from slipstream import telemetry
from slipstream.errors import SlipstreamError, UnavailableError
from slipstream.placement_settings import KubernetesSettings
from slipstream.scaler import ScaledWorker, SickWorker
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.worker_roles import change_role

log = telemetry.get_logger(__name__)

APPEARS_WITHIN_S = 3.0
"""A Deployment makes a pod within a fraction of a second, unless something forbids it."""
GOES_WITHIN_S = 3.0
CHOSEN_S = 30.0
"""So long a pod that was chosen to go is counted as ending although Kubernetes has not begun to end it."""
LOST_AFTER_S = 30.0
"""A pod that ran, and has not been ready for so long, is not on its way: its node is gone, or its worker hangs."""
LOOK_EVERY_S = 0.1
MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True)
class Look:
    """Everything at one moment."""

    pools: Sequence[Pool]
    pods: Sequence[Pod]

    def members(self, pool: Pool) -> list[Pod]:
        return members(pool, self.pods)

    def find(self, name: str) -> tuple[Pool, Pod] | None:
        """The pod of that name, and its pool."""
        for pool in self.pools:
            for pod in self.members(pool):
                if pod.name == name:
                    return pool, pod
        return None


class KubernetesScaler:
    """A `slipstream.scaler.Scaler` and `Reporter`.

    Args:
        records: of the workers as the registry has them: where their roles are changed.
        clock, unix_clock: seconds that never go backwards, and the time that objects are stamped with.
    """

    def __init__(
        self,
        api: KubernetesApi,
        settings: KubernetesSettings,
        records: Callable[[], Iterable[WorkerRecord]],
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._settings = settings
        self._records = records
        self._clock = clock
        self._unix_clock = unix_clock
        self._lease = PlannerLease(api, settings.lease, clock=clock)
        self._holder, self._lease_s, self._renewed_s = "", 0.0, 0.0

    async def workers(self) -> Sequence[ScaledWorker]:
        """See `Scaler.workers`. Without pods that nobody should count on: they found no room for long, or are lost."""
        async with self._within("listing workers"):
            look = await self._look()
        return [
            ScaledWorker(pod.name, pool.model, pool.role, pod.created_unix_s, self._is_ending(pod))
            for pool in look.pools
            for pod in look.members(pool)
            if not pod.over and not self._is_stuck(pod) and not self._is_lost(pod)
        ]

    async def start(self, model: str, role: Role.ValueType) -> str:
        """See `Scaler.start`: one seat more for the pool whose pods begin in this role; its new pod is the worker."""
        async with self._within(f"starting a worker of {model}"):
            await self._ensure_lease()
            look = await self._look()
            pool = _pool_for(look.pools, model, role)
            self._check_room(pool, look.members(pool))
            known = {one.uid for one in look.members(pool)}
            seats = await add_seats(self._api, pool, +1)
            name = await self._appeared(pool, known)
            if name is None:
                await add_seats(self._api, pool, -1)
                raise UnavailableError(await self._why_no_pod(pool, seats), code="no_pod")
            return name

    async def drain(self, worker_id: str) -> str:
        """See `Scaler.drain`: the pod ends, and its pool has one seat fewer. SIGTERM makes its worker drain."""
        async with self._within(f"draining {worker_id}"):
            await self._ensure_lease()
            look = await self._look()
            found = look.find(worker_id)
            if found is None or not found[1].active or self._is_ending(found[1]):
                return worker_id
            pool, pod = found
            if pool.ends_last and pod.sick:
                # Its seat is not the last one: it keeps it, and its group is made anew. One that was started in its
                # place is one more, until the planner finds that it is not needed.
                await self._delete(pod)
                return worker_id
            if pool.ends_last:
                return await self._drain_last(pool, look.members(pool))
            await self._choose(pod)
            try:
                await self._give_up(pool, pod, [one for one in look.members(pool) if one.active])
            except KubernetesError:
                await self._choose(pod, chosen=False)
                raise
            return worker_id

    async def flip(self, worker_id: str, role: Role.ValueType) -> None:
        """See `Scaler.flip`: the worker itself is asked; its pod stays in the pool in which it began."""
        await self._ensure_lease()
        await change_role(self._records(), worker_id, role, timeout_s=self._settings.timeout_s)

    async def hold_lease(self, holder: str, lease_s: float) -> bool:
        """See `Scaler.hold_lease`."""
        asked_s = self._clock()
        # Whoever cannot renew in two thirds of the time must believe that another one has it.
        async with self._api.within(min(self._settings.timeout_s, lease_s * 2 / 3), "holding the lease"):
            held = await self._lease.hold(holder, lease_s)
        self._holder, self._lease_s = holder, lease_s
        self._renewed_s = asked_s if held else asked_s - lease_s
        return held

    async def release_lease(self, holder: str) -> None:
        """See `Scaler.release_lease`."""
        async with self._within("releasing the lease"):
            await self._lease.release(holder)

    async def report(self, sick: SickWorker) -> None:
        """See `Reporter.report`: the pod is marked. Where its device is what is wrong, its node takes nothing new, if
        `kubernetes.taint_nodes` is set."""
        async with self._within(f"reporting {sick.worker_id}"):
            reasons = "; ".join(sick.reasons)[:MAX_REASON_CHARS] or "sick"
            body = {"metadata": {"annotations": {SICK_ANNOTATION: reasons}}}
            with suppress(ObjectMissingError):
                await self._api.call("patch", PODS, sick.worker_id, body=body)
            if sick.device and sick.node and self._settings.taint_nodes:
                await keep_off(self._api, sick.node)

    # -- what is ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _within(self, what: str) -> AsyncIterator[None]:
        async with self._api.within(self._settings.timeout_s, what):
            yield

    async def _look(self) -> Look:
        query = {"labelSelector": self._settings.selector}
        pools = pools_of(_items(await self._api.call("list", DEPLOYMENTS, query=query)), DEPLOYMENTS)
        if self._settings.leader_worker_sets:
            found = await self._api.call("list", LEADER_WORKER_SETS, query=query)
            pools += pools_of(_items(found), LEADER_WORKER_SETS)
        pods = pods_of(_items(await self._api.call("list", PODS, query=query)))
        return Look(sorted(pools, key=lambda one: one.name), pods)

    def _is_ending(self, pod: Pod) -> bool:
        """One that was chosen and does not go after all counts again: the choice is made anew then."""
        return pod.ending or self._unix_clock() < pod.draining_since_unix_s + CHOSEN_S

    def _is_stuck(self, pod: Pod) -> bool:
        return bool(pod.stuck) and self._unix_clock() >= pod.stuck_since_unix_s + self._settings.pending_s

    def _is_lost(self, pod: Pod) -> bool:
        """If its worker lives all the same, the registry knows it."""
        return bool(pod.fell_unix_s) and self._unix_clock() >= pod.fell_unix_s + LOST_AFTER_S

    # -- what is done -------------------------------------------------------------------------------------

    async def _ensure_lease(self) -> None:
        """Renew the lease where much of its time has passed since the planner held it: actions take theirs.

        Raises:
            UnavailableError: another planner acts by now, or none held it ever.
        """
        if self._clock() < self._renewed_s + self._lease_s / 2:
            return
        if not self._holder or not await self.hold_lease(self._holder, self._lease_s):
            raise UnavailableError("another planner holds the lease by now", code="lease_lost")

    def _check_room(self, pool: Pool, pods: Sequence[Pod]) -> None:
        if pool.most is not None and pool.replicas >= pool.most:
            raise UnavailableError(f"{pool.name} has {pool.replicas} seats, the most it may have", code="no_room")
        for pod in pods:
            if pod.active and self._is_stuck(pod):
                raise UnavailableError(f"{pool.name}: pod {pod.name} waits already: {pod.stuck}", code="no_room")

    async def _appeared(self, pool: Pool, known: set[str]) -> str | None:
        ends_s = self._clock() + APPEARS_WITHIN_S
        while self._clock() < ends_s:
            for pod in (await self._look()).members(pool):
                if pod.uid not in known and pod.active:
                    return pod.name
            await asyncio.sleep(LOOK_EVERY_S)
        return None

    async def _why_no_pod(self, pool: Pool, seats: int) -> str:
        now = next((one for one in (await self._look()).pools if one.name == pool.name), pool)
        reason = now.failure or "see `kubectl describe replicaset`"
        return f"{pool.name} was to have {seats} pods and made none within {APPEARS_WITHIN_S:g} s: {reason}"

    async def _choose(self, pod: Pod, *, chosen: bool = True) -> None:
        """Mark the pod as the one to go, for Kubernetes and for whoever plans next; or take the mark away."""
        annotations = {
            DELETION_COST_ANNOTATION: str(LEAST_COST) if chosen else None,
            DRAINING_ANNOTATION: str(int(self._unix_clock())) if chosen else None,
        }
        body = {"metadata": {"uid": pod.uid, "annotations": annotations}}
        with suppress(ObjectMissingError):
            await self._api.call("patch", PODS, pod.name, body=body)

    async def _give_up(self, pool: Pool, pod: Pod, active: Sequence[Pod]) -> None:
        """Have the chosen pod ended, and one seat fewer in its pool."""
        if len(active) > pool.replicas:  # a seat was taken away already, and nobody has gone yet
            await self._delete(pod)
        elif goes_first(pod, active):
            await add_seats(self._api, pool, -1)
            await self._see_it_go(pool, pod)
        else:
            # Kubernetes would end another one. The replacement that it may begin to make goes with the seat.
            await self._delete(pod)
            await add_seats(self._api, pool, -1)

    async def _see_it_go(self, pool: Pool, pod: Pod) -> None:
        """Until Kubernetes ends the chosen pod. If it took another one, because that had just failed, the chosen one is
        ended too, and the pool replaces the other."""
        ends_s = self._clock() + GOES_WITHIN_S
        while self._clock() < ends_s:
            pods = (await self._look()).members(pool)
            chosen = next((one for one in pods if one.uid == pod.uid), None)
            if chosen is None or not chosen.active:
                return
            if sum(one.active for one in pods) < pool.replicas:
                log.info("another_pod_went", pool=pool.name, chosen=pod.name)
                await self._delete(pod)
                return
            await asyncio.sleep(LOOK_EVERY_S)
        log.warning("pod_goes_later", pool=pool.name, pod=pod.name, waited_s=GOES_WITHIN_S)

    async def _delete(self, pod: Pod) -> None:
        """Have this very pod ended, with its own grace period; a later one of the same name is not meant."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": pod.uid}}
        with suppress(ObjectMissingError, ConflictError):
            await self._api.call("delete", PODS, pod.name, body=options)

    async def _drain_last(self, pool: Pool, pods: Sequence[Pod]) -> str:
        """Of a LeaderWorkerSet the last group goes, whichever was meant."""
        last = max((one for one in pods if one.active), key=lambda one: one.group)
        if not self._is_ending(last):
            await self._choose(last)
            await add_seats(self._api, pool, -1)
        return last.name


@asynccontextmanager
async def open_scaler(
    settings: KubernetesSettings, records: Callable[[], Iterable[WorkerRecord]]
) -> AsyncIterator[KubernetesScaler]:
    """The scaler of these settings while the block runs.

    Raises:
        ConfigError: it is not known where the API server is, or who we are.
    """
    async with connected(settings) as api:
        scaler = KubernetesScaler(api, settings, records)
        await _tell_pools(scaler, api)
        yield scaler


async def _tell_pools(scaler: KubernetesScaler, api: KubernetesApi) -> None:
    try:
        workers = await scaler.workers()
    except SlipstreamError as error:  # the planner goes on without it, as it does later
        log.warning("kubernetes_not_seen", namespace=api.namespace, reason=error.message)
    else:
        log.info("kubernetes_seen", namespace=api.namespace, workers=len(workers))


def _pool_for(pools: Sequence[Pool], model: str, role: Role.ValueType) -> Pool:
    fitting = [one for one in pools if one.model == model and one.role == role]
    if not fitting:
        there = ", ".join(f"{one.name} ({Role.Name(one.role)} {one.model})" for one in pools) or "none"
        raise UnavailableError(f"no pool starts {Role.Name(role)} workers of {model}; pools: {there}", code="no_pool")
    # Of several, one with room; of these the first by name, so that two planners choose alike.
    return next((one for one in fitting if one.most is None or one.replicas < one.most), fitting[0])


def _items(found: Object) -> Sequence[Object]:
    return found.get("items") or ()
