"""Placement groups and actors of one named cluster: made, found again, ended.

Everything has a name that says whose it is: the actor and the placement group of worker `worker-3` of the cluster
`chat` are both called `chat/worker-3`, in Ray's namespace `slipstream`. Both are detached: they outlive whoever made
them, and are found again by name. Actors are never restarted by Ray (`max_restarts=0`): Ray would bring one back into
its old place, on a node that may be the reason of its end, while the pool may want another role somewhere else.

Ray's calls block; they run in threads, each with a deadline.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from deploy.ray.nodes import RayNode, read_nodes
from deploy.ray.placement import Bundle, describe_bundle, describe_room
from deploy.ray.worker_actor import Found, Order, WorkerActor
from slipstream import telemetry
from slipstream.errors import DeadlineError, UnavailableError, WorkerLostError

log = telemetry.get_logger(__name__)

T = TypeVar("T")

NAMESPACE = "slipstream"

_CALL_TIMEOUT_S = 10.0
_ASK_TIMEOUT_S = 5.0
_BEGIN_TIMEOUT_S = 60.0
"""For Ray to start the actor's Python process on a node, which may be busy."""
_ON_CHOSEN_NODE_S = 3.0
"""What looked free may be taken: after this long any node will do."""
_POLL_S = 0.05


class Places:
    """The places of one cluster's workers. Needs `ray.init` before, with the namespace `NAMESPACE`.

    Args:
        asker: the name under which actors are asked; of its own when absent. Never used by two at the same time.
    """

    def __init__(self, cluster: str, asker: str = "") -> None:
        self._prefix = f"{cluster}/"
        self._asker = asker or uuid.uuid4().hex

    @property
    def asker(self) -> str:
        """The name under which actors are asked here."""
        return self._asker

    async def nodes(self) -> list[RayNode]:
        """The nodes that are alive."""
        return await _called(read_nodes)

    async def place(
        self,
        worker_id: str,
        bundle: Bundle,
        nodes: Collection[RayNode],
        chosen: str | None,
        timeout_s: float,
    ) -> str:
        """Make the placement group of a worker; returns the node, where it is known.

        Args:
            nodes: that are alive.
            chosen: of these, the one that is wanted; none where no node has room now.

        Raises:
            UnavailableError: no node has had room within the time; the message says what was asked, and what there is.
        """
        ends_s = time.monotonic() + timeout_s
        try:
            if chosen is not None:
                await self._reserve(worker_id, bundle, f"in({chosen})")
                if await self._reserved(worker_id, min(_ON_CHOSEN_NODE_S, timeout_s)):
                    return chosen
                await self.forget(worker_id)
            # Not on a chosen one, so that an autoscaler of Ray's sees what is missing, and not on one that will go.
            going = ",".join(node.node_id for node in nodes if not node.stays)
            await self._reserve(worker_id, bundle, f"!in({going})" if going else "")
            if await self._reserved(worker_id, ends_s - time.monotonic()):
                return ""
        except BaseException:
            await asyncio.shield(self.forget(worker_id))
            raise
        await self.forget(worker_id)
        raise UnavailableError(
            f"no node of the Ray cluster had room for {describe_bundle(bundle)} within {timeout_s:g} s "
            f"(ray.place_timeout_s): {describe_room(await self.nodes(), bundle)}",
            code="no_room",
        )

    async def begin(self, order: Order, bundle: Bundle) -> Found:
        """Start the worker in its placement group.

        Raises:
            WorkerLostError: its node or its actor went meanwhile, or did not begin in time.
        """

        def make() -> Any:
            import ray
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            name = self._name(order.worker_id)
            group = ray.util.get_placement_group(name)
            options = {
                "name": name,
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "max_restarts": 0,
                "num_cpus": bundle.get("CPU", 0),
                "num_gpus": bundle.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
            }
            actor: Any = ray.remote(WorkerActor)
            return actor.options(**options).remote(order)

        try:
            actor = await _called(make)
        except ValueError:
            raise WorkerLostError(f"the place of {order.worker_id} has gone") from None
        await _answer(actor.start.remote(), f"{order.worker_id} does not begin", _BEGIN_TIMEOUT_S)
        return await self.describe(order.worker_id)

    async def begin_again(self, worker_id: str) -> None:
        """Start the worker of an actor whose maker went before it had done so.

        Raises:
            WorkerLostError: see `describe`.
        """
        actor = await self._actor(worker_id)
        await _answer(actor.start.remote(), f"{worker_id} does not begin", _BEGIN_TIMEOUT_S)

    async def names(self) -> set[str]:
        """Worker ids of all actors that there are, whoever made them."""

        def listed() -> list[str]:
            import ray

            return list(ray.util.list_named_actors())

        return self._own(await _called(listed))

    async def describe(self, worker_id: str, *, keep: bool = True, timeout_s: float = _ASK_TIMEOUT_S) -> Found:
        """What the actor says of itself; being asked keeps it alive, unless one only looks.

        Raises:
            WorkerLostError: it is gone, or cannot be reached.
        """
        actor = await self._actor(worker_id)
        asker = self._asker if keep else ""
        found: Found = await _answer(actor.describe.remote(asker), f"{worker_id} does not answer", timeout_s)
        return found

    async def drain(self, worker_id: str) -> None:
        """Ask the worker to finish what it has and end.

        Raises:
            WorkerLostError: see `describe`.
        """
        actor = await self._actor(worker_id)
        await _answer(actor.drain.remote(), f"{worker_id} cannot be asked to drain", _ASK_TIMEOUT_S)

    async def ended(self, worker_id: str) -> str:
        """Wait until the worker has ended by itself, and say how.

        Raises:
            WorkerLostError: its node or its actor is gone, or cannot be reached now.
        """
        actor = await self._actor(worker_id)
        how: str = await _answer(actor.ended.remote(), f"{worker_id} was lost", math.inf)
        return how

    async def forget(self, worker_id: str) -> None:
        """Remove the placement group, and so kill what runs in it; of one that is not there: nothing."""

        def remove() -> None:
            import ray

            try:
                group = ray.util.get_placement_group(self._name(worker_id))
            except ValueError:  # no such group
                return
            ray.util.remove_placement_group(group)

        await _called(remove)

    async def groups(self) -> set[str]:
        """Worker ids of all placement groups that there are."""

        def listed() -> list[str]:
            import ray

            table = ray.util.placement_group_table()
            return [one["name"] for one in table.values() if one["state"] != "REMOVED"]

        return self._own(await _called(listed))

    async def _actor(self, worker_id: str) -> Any:
        def get() -> Any:
            import ray

            return ray.get_actor(self._name(worker_id), namespace=NAMESPACE)

        try:
            return await _called(get)
        except ValueError:
            raise WorkerLostError(f"{worker_id} is not there any more") from None

    async def _reserve(self, worker_id: str, bundle: Bundle, node_selector: str) -> None:
        def make() -> None:
            import ray

            ray.util.placement_group(
                [dict(bundle)],
                strategy="STRICT_PACK",
                name=self._name(worker_id),
                lifetime="detached",
                bundle_label_selector=[{"ray.io/node-id": node_selector}] if node_selector else None,
            )

        await _called(make)

    async def _reserved(self, worker_id: str, timeout_s: float) -> bool:
        """Whether the group is there within the time."""

        def state() -> str:
            import ray

            group = ray.util.get_placement_group(self._name(worker_id))
            found: str = ray.util.placement_group_table(group)["state"]
            return found

        ends_s, wait_s = time.monotonic() + timeout_s, _POLL_S
        while (await _called(state)) != "CREATED":
            if time.monotonic() > ends_s:
                return False
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 1.0)
        return True

    def _name(self, worker_id: str) -> str:
        return f"{self._prefix}{worker_id}"

    def _own(self, names: Collection[str]) -> set[str]:
        return {name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)}


async def _called(call: Callable[[], T]) -> T:
    """A blocking call of Ray's, in a thread, with a deadline.

    Raises:
        DeadlineError: Ray's head has not answered in time.
        UnavailableError: Ray has failed.
    """
    import ray

    try:
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            return await asyncio.to_thread(call)
    except TimeoutError:
        raise DeadlineError(f"the head of the Ray cluster has not answered within {_CALL_TIMEOUT_S:g} s") from None
    except ray.exceptions.RayError as error:
        raise UnavailableError(f"Ray has failed: {type(error).__name__}: {error}", code="ray_failed") from None


async def _answer(ref: Any, what: str, timeout_s: float) -> Any:
    """What an actor answers.

    Raises:
        WorkerLostError: it died, is unreachable, or has not answered in time.
    """
    import ray

    try:
        async with asyncio.timeout(None if timeout_s == math.inf else timeout_s):
            return await ref
    except TimeoutError:
        raise WorkerLostError(f"{what}: no answer within {timeout_s:g} s") from None
    except ray.exceptions.RayTaskError as error:
        raise WorkerLostError(f"{what}: {error.cause}") from None
    except ray.exceptions.RayError as error:
        raise WorkerLostError(f"{what}: {type(error).__name__}") from None
