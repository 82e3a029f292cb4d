"""The workers that shall be there on a Ray cluster: placed, watched, replaced when they or their nodes go, drained.

The pool's process may be killed at any time: the workers go on, and the next one finds them again by name. What it
knows besides comes from the registry: which workers are ready, in which role, and whose lease has ended. Each worker
has one task here, from the order to the end; a loop beside them looks at nodes and silent workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator

from deploy.ray.adoption import Adopted, found_workers
from deploy.ray.draining import DrainingNodes
from deploy.ray.orders import Orders
from deploy.ray.places import Places
from deploy.ray.placing import Placing
from deploy.ray.pool_worker import PoolWorker
from deploy.supervisor import RestartPolicy
from slipstream import registry_watch, telemetry
from slipstream.background import background, first_error
from slipstream.errors import (
    InvalidRequestError,
    SlipstreamError,
    StartupError,
    UnavailableError,
    WorkerLostError,
)
from slipstream.registry_watch import RegistryView
from slipstream.scaler import ScaledWorker
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerSet, WorkerState

log = telemetry.get_logger(__name__)

LOOK_EVERY_S = 0.5
ASK_EVERY_S = 1.0
"""Between two questions to each actor; an actor that nobody asks is an orphan after `ray.orphan_after_s`."""
_START_WAIT_S = 5.0
"""How long `start` waits to learn that there is no room; a planner waits twice as long."""
_PLACE_AGAIN_S = 5.0
_ANSWER_TIMEOUT_S = 2.0
_UNREACHABLE_TRIES = 3
_KILL_AFTER_DRAIN_S = 10.0
_CLEAN_UP_S = 10.0


class Pool:
    """See the module. `run` must run for as long as anything is asked of it.

    Attributes:
        whole: all workers of the settings have been ready once; from then on none is given up.
    """

    def __init__(
        self,
        orders: Orders,
        places: Places,
        *,
        policy: RestartPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.whole = False
        self._orders = orders
        self._settings = orders.settings
        self._places = places
        self._placing = Placing(places, orders)
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._unix_clock = unix_clock
        self._workers: dict[str, PoolWorker] = {}
        self._ever: set[str] = set()
        self._numbers: Iterator[int] = itertools.count()
        self._view = RegistryView()
        self._failure: asyncio.Future[SlipstreamError] = asyncio.get_running_loop().create_future()
        self._dead: dict[str, ScaledWorker] = {}
        self._died_s: dict[Role.ValueType, list[float]] = {}
        self._draining = DrainingNodes(
            drain_timeout_s=orders.settings.worker.drain_timeout_s,
            start_limit_s=orders.settings.ray.place_timeout_s + orders.settings.worker.start_timeout_s,
        )
        self._closing = False

    @property
    def most_workers(self) -> int:
        cluster = self._settings.cluster
        return max(cluster.max_workers or 0, cluster.prefill + cluster.decode)

    @property
    def model(self) -> str:
        return self._orders.model

    def workers(self) -> list[ScaledWorker]:
        """All that there are, also those that wait for a place.

        Those that have successors count as ending: one on a draining node, and a dead one that the registry still has.
        A planner would see one too many else, and drain the successor.
        """
        succeeded = {one.replaces for one in self._workers.values() if not one.ending}
        there = [
            ScaledWorker(
                one.worker_id, self.model, one.role, one.ordered_unix_s, one.ending or one.worker_id in succeeded
            )
            for one in self._workers.values()
        ]
        return [*there, *self._dead.values()]

    def records(self) -> list[WorkerRecord]:
        """The workers as the registry has them."""
        return self._view.records()

    async def run(self) -> None:
        """Have the settings' workers there until cancelled, which leaves them running (`close` ends them).

        Raises:
            StartupError: before all were ready once, one could not be placed or ended.
        """
        await self._adopt()
        registry = self._settings.control_plane.address
        with first_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    registry_watch.follow(registry, take=self._take, lost=lambda reason: None, identities=True)
                )
                group.create_task(self._look_again_and_again())
                group.create_task(self._ask_again_and_again())
                group.create_task(self._raise_failure())

    async def start(self, model: str, role: Role.ValueType) -> str:
        """See `Scaler.start`.

        Raises:
            UnavailableError: no node has room, as far as that is known soon; or there are too many.
            InvalidRequestError: this cluster does not serve that model.
        """
        if role not in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
            raise InvalidRequestError("role: ROLE_PREFILL or ROLE_DECODE is needed", param="role")
        if model != self.model:
            raise InvalidRequestError(f"model: this cluster serves {self.model}, not {model[:256]}", param="model")
        self._check_open()
        there = sum(1 for one in self._workers.values() if not one.ending and not one.replaces)
        if there >= self.most_workers:
            raise UnavailableError(
                f"there are {there} workers, the most that there shall be (cluster.max_workers)", code="no_room"
            )
        worker = self._add(role, must=False)
        await asyncio.wait({worker.reserved}, timeout=_START_WAIT_S)
        if worker.reserved.done():
            worker.reserved.result()
        return worker.worker_id

    def drain(self, worker_id: str) -> None:
        """See `Scaler.drain`. One that is not ready yet has nothing to finish, and is ended at once."""
        self._check_open()
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._end(worker)

    def bar(self, worker_id: str, why: str) -> None:
        """Place nothing new on the node of this worker, whose device is sick, as long as the node is in the cluster."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._placing.bar(worker.node_id, why)

    async def close(self) -> None:
        """Drain all workers and wait for their end, as long as a drain may take. Nothing of them is left on Ray."""
        self._closing = True
        for worker in list(self._workers.values()):
            self._end(worker)
        tasks = [worker.task for worker in self._workers.values() if worker.task is not None]
        if tasks:
            limit_s = self._settings.worker.drain_timeout_s + _KILL_AFTER_DRAIN_S
            _, late = await asyncio.wait(tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_CLEAN_UP_S)
        await self._sweep(lambda worker_id: worker_id in self._ever)

    async def abandon(self) -> None:
        """Let go of the workers without ending them."""
        self._closing = True
        tasks = [worker.task for worker in self._workers.values() if worker.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check_open(self) -> None:
        if not self.whole or self._closing:
            raise UnavailableError("the cluster is still starting, or stopping", code="not_ready")

    async def _adopt(self) -> None:
        """Go on with what an earlier pool of this cluster has left, and order what is missing."""
        cluster = self._settings.cluster
        found = await found_workers(self._places, self._orders.settings_id)
        await self._sweep(lambda worker_id: worker_id not in found.names)
        taken = [int(name.rpartition("-")[2]) for name in found.names if name.rpartition("-")[2].isdigit()]
        self._numbers = itertools.count(max(taken, default=-1) + 1)
        for one in found.ours:
            self._take_over(one)
        self.whole = bool(found.ours)
        there = Counter(one.role for one in self._workers.values() if not one.ending)
        for role, wanted in ((Role.ROLE_PREFILL, cluster.prefill), (Role.ROLE_DECODE, cluster.decode)):
            # With a planner the numbers are its own, as long as there is any worker of the role.
            missing = 0 if cluster.autoscale and there[role] else wanted - there[role]
            for _ in range(missing):
                self._add(role)
            if not cluster.autoscale:
                self._trim(role, -missing)

    def _trim(self, role: Role.ValueType, surplus: int) -> None:
        """What still starts goes before what runs."""
        workers = sorted((one for one in self._workers.values() if one.role == role), key=lambda one: one.ready)
        for worker in workers[: max(0, surplus)]:
            self._end(worker)

    def _take_over(self, one: Adopted) -> None:
        worker = PoolWorker(one.worker_id, one.role, one.ordered_unix_s, node_id=one.node_id, ending=one.ending)
        # Whether it is ready is the registry's to say; one that was started is asked to drain, not killed.
        worker.ready = one.started
        worker.reserved.set_result(None)
        self._workers[one.worker_id] = worker
        self._ever.add(one.worker_id)
        worker.task = asyncio.create_task(self._care(worker, adopted=one), name=f"care {one.worker_id}")
        log.info("worker_found_again", worker_id=one.worker_id, node=one.node_id)

    def _add(self, role: Role.ValueType, *, must: bool = True, replaces: str = "", delay_s: float = 0.0) -> PoolWorker:
        name = f"worker-{next(self._numbers)}"
        worker = PoolWorker(name, role, self._unix_clock(), must=must, replaces=replaces)
        self._workers[name] = worker
        self._ever.add(name)
        worker.task = asyncio.create_task(self._care(worker, delay_s=delay_s), name=f"care {name}")
        return worker

    async def _care(self, worker: PoolWorker, *, delay_s: float = 0.0, adopted: Adopted | None = None) -> None:
        """One worker from its order to its end, and what follows from that."""
        error: SlipstreamError | None = None
        how = ""
        try:
            await asyncio.sleep(delay_s)
            await self._begin(worker, adopted)
            how = await self._until_ended(worker)
        except SlipstreamError as failure:
            error = failure
        except asyncio.CancelledError:
            if not worker.ending:  # let go of, not ended
                raise
        self._workers.pop(worker.worker_id, None)
        if not worker.reserved.done():
            worker.reserved.set_exception(
                error or UnavailableError(f"{worker.worker_id} was ended before it had begun")
            )
            worker.reserved.exception()  # whoever waits hears it; nobody has to
        # What follows does not wait for Ray to clean up.
        self._follow_up(worker, how, error)
        with contextlib.suppress(SlipstreamError):
            await self._places.forget(worker.worker_id)

    async def _begin(self, worker: PoolWorker, adopted: Adopted | None) -> None:
        if adopted is not None:
            if not adopted.started:
                await self._places.begin_again(worker.worker_id)
            return
        await self._place(worker)
        order = self._orders.order(worker.worker_id, worker.role, worker.ordered_unix_s)
        found = await self._places.begin(order, self._orders.bundle)
        worker.node_id = found.node_id
        log.info("worker_placed", worker_id=worker.worker_id, role=Role.Name(worker.role), node=found.node_id)

    async def _place(self, worker: PoolWorker) -> None:
        while True:
            try:
                await self._placing.place(worker, [one for one in self._workers.values() if not one.ending])
            except UnavailableError as error:
                if not (worker.must and self.whole):
                    raise
                log.warning("worker_waits_for_room", worker_id=worker.worker_id, reason=error.message)
                await asyncio.sleep(_PLACE_AGAIN_S)
            else:
                worker.reserved.set_result(None)
                return

    async def _until_ended(self, worker: PoolWorker) -> str:
        """How it has ended.

        Raises:
            WorkerLostError: with its actor or its node, or the registry has lost it and its actor does not answer.
        """
        async with background(_wait(worker.lost), name=f"lost {worker.worker_id}") as lost:
            while True:
                ended = asyncio.ensure_future(self._places.ended(worker.worker_id))
                try:
                    await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
                    if lost.done():
                        raise WorkerLostError(f"{worker.worker_id} has left the registry, and does not answer")
                    return ended.result()
                except WorkerLostError:
                    if lost.done() or not await self._answers(worker):
                        raise
                finally:
                    ended.cancel()
                    await asyncio.wait({ended})

    async def _answers(self, worker: PoolWorker) -> bool:
        """Whether the actor is there after all: a connection may break without it."""
        for _ in range(_UNREACHABLE_TRIES):
            if worker.worker_id not in await self._places.names():
                return False
            try:
                await self._places.describe(worker.worker_id, timeout_s=_ANSWER_TIMEOUT_S)
            except WorkerLostError:
                if self._is_missing(worker):
                    return False
                await asyncio.sleep(LOOK_EVERY_S)
            else:
                return True
        return False

    def _follow_up(self, worker: PoolWorker, how: str, error: SlipstreamError | None) -> None:
        """A worker has gone: say so, and have another in its place if it was to stay."""
        if worker.ending:
            log.info("worker_retired", worker_id=worker.worker_id)
            return
        reason = error.message if error is not None else how
        if not self.whole:
            self._fail(StartupError(f"{worker.worker_id}: {reason}"))
            return
        if isinstance(error, UnavailableError) and error.code == "no_room":
            log.warning("worker_not_placed", worker_id=worker.worker_id, reason=reason)
            return
        log.warning("worker_gone", worker_id=worker.worker_id, node=worker.node_id, reason=reason)
        if worker.worker_id in self._listed():
            self._dead[worker.worker_id] = ScaledWorker(
                worker.worker_id, self.model, worker.role, worker.ordered_unix_s, ending=True
            )
        if self._closing or self._successor(worker) is not None:
            return
        # The loss of a node is no fault of the worker's: nothing is gained by waiting.
        delay_s = 0.0 if isinstance(error, WorkerLostError) else self._delay_s(worker.role)
        successor = self._add(worker.role, replaces=worker.replaces, delay_s=delay_s)
        log.info("worker_replaced", worker_id=worker.worker_id, by=successor.worker_id, in_s=delay_s)

    def _delay_s(self, role: Role.ValueType) -> float:
        died_s = self._died_s.setdefault(role, [])
        now_s = self._clock()
        delay_s = self._policy.delay_s(died_s, now_s)
        died_s.append(now_s)
        del died_s[: -self._policy.limit]
        return self._policy.max_delay_s if delay_s is None else delay_s

    def _end(self, worker: PoolWorker) -> None:
        if worker.ending:
            return
        worker.ending = True
        log.info("worker_ending", worker_id=worker.worker_id, ready=worker.ready)
        if worker.task is None:
            return
        if worker.ready:
            asyncio.get_running_loop().create_task(self._ask_to_drain(worker, worker.task))
        else:
            worker.task.cancel()

    async def _ask_to_drain(self, worker: PoolWorker, care: asyncio.Task[None]) -> None:
        try:
            await self._places.drain(worker.worker_id)
            # The actor kills what has not ended by itself; this is for an actor that is gone.
            await asyncio.wait({care}, timeout=self._settings.worker.drain_timeout_s + 2 * _KILL_AFTER_DRAIN_S)
        except SlipstreamError as error:
            log.warning("worker_not_asked_to_drain", worker_id=worker.worker_id, reason=error.message)
        care.cancel()

    def _successor(self, worker: PoolWorker) -> PoolWorker | None:
        return next(
            (one for one in self._workers.values() if one.replaces == worker.worker_id and not one.ending), None
        )

    async def _take(self, workers: WorkerSet) -> None:
        self._view.apply(workers)
        ready = Counter[Role.ValueType]()
        for record in self._view.records():
            worker = self._workers.get(record.worker_id)
            if worker is None:
                continue
            worker.role = record.role
            if record.state == WorkerState.READY:
                worker.ready = True
                ready[record.role] += 1
        listed = self._listed()
        self._dead = {worker_id: one for worker_id, one in self._dead.items() if worker_id in listed}
        cluster = self._settings.cluster
        if not self.whole and ready[Role.ROLE_PREFILL] >= cluster.prefill and ready[Role.ROLE_DECODE] >= cluster.decode:
            self.whole = True
            log.info("pool_whole", workers=len(self._workers))

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._see_to_draining_nodes()
            except SlipstreamError as error:
                log.warning("nodes_unknown", reason=error.message)

    async def _see_to_draining_nodes(self) -> None:
        """First the replacement, then the drain; the drain alone where time runs out."""
        now_s = self._unix_clock()
        leave_s = self._draining.look(await self._places.nodes(), now_s)
        if not self.whole or self._closing:
            return
        for worker in list(self._workers.values()):
            if worker.node_id not in leave_s or worker.ending:
                continue
            successor = self._successor(worker)
            if successor is None:
                successor = self._add(worker.role, replaces=worker.worker_id)
                log.info("node_draining", node=worker.node_id, worker_id=worker.worker_id, by=successor.worker_id)
            if successor.ready or not worker.ready or now_s >= leave_s[worker.node_id]:
                self._end(worker)

    async def _ask_again_and_again(self) -> None:
        """Keep the actors from taking themselves for orphans; of those that the registry has lost, see who is dead."""
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            asked = [worker for worker in self._workers.values() if worker.node_id and worker.reserved.done()]
            await asyncio.gather(*(self._ask(worker) for worker in asked))

    async def _ask(self, worker: PoolWorker) -> None:
        try:
            await self._places.describe(worker.worker_id, timeout_s=_ANSWER_TIMEOUT_S)
        except SlipstreamError:
            if self._is_missing(worker):
                worker.lost.set()

    def _listed(self) -> set[str]:
        return {record.worker_id for record in self._view.records()}

    def _is_missing(self, worker: PoolWorker) -> bool:
        """Whether the registry had it as ready, and has it no more."""
        return worker.ready and self._view.settled and worker.worker_id not in self._listed()

    async def _sweep(self, unused: Callable[[str], bool]) -> None:
        """Remove placement groups that nobody uses any more."""
        for worker_id in sorted(filter(unused, await self._places.groups())):
            log.info("group_left_over", worker_id=worker_id)
            await self._places.forget(worker_id)

    def _fail(self, error: SlipstreamError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    async def _raise_failure(self) -> None:
        raise await self._failure


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
