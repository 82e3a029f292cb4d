"""Of several planners one acts: the Lease, held over clocks that differ, and by two that try at once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from deploy.kubernetes.lease import LeaseWatch
from tests.support.kubernetes_server import Fault, KubernetesServer
from tests.unit.deploy.kubernetes.world import planner

LEASE_S = 30.0
LEASE = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "slipstream-planner"}}


async def test_one_holds_it_the_other_gets_it_when_the_first_is_silent_or_lets_go(tmp_path: Path) -> None:
    async with (
        KubernetesServer() as server,
        planner(server, tmp_path, holder="") as one,
        planner(server, tmp_path, holder="") as two,
    ):
        assert await one.scaler.hold_lease("one", LEASE_S)
        assert not await two.scaler.hold_lease("two", LEASE_S)
        two.time.ahead_s += LEASE_S - 1
        assert not await two.scaler.hold_lease("two", LEASE_S)
        assert await one.scaler.hold_lease("one", LEASE_S)
        two.time.ahead_s += LEASE_S - 1
        assert not await two.scaler.hold_lease("two", LEASE_S), "the first was heard of meanwhile"
        two.time.ahead_s += LEASE_S
        assert await two.scaler.hold_lease("two", LEASE_S)
        assert not await one.scaler.hold_lease("one", LEASE_S)
        await one.scaler.release_lease("one")
        assert not await one.scaler.hold_lease("one", LEASE_S), "who has it not gives nothing away"
        await two.scaler.release_lease("two")
        assert await one.scaler.hold_lease("one", LEASE_S)
        spec = server.store.get("leases", "slipstream-planner")["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 30, 2)


async def test_the_times_that_another_machine_wrote_are_not_believed(tmp_path: Path) -> None:
    async with KubernetesServer() as server, planner(server, tmp_path, holder="") as at:
        for written in ("1999-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z"):
            spec = {"holderIdentity": "other", "leaseDurationSeconds": 30, "renewTime": written}
            server.store.objects["leases"] = {}
            server.store.create("leases", {**LEASE, "spec": spec})
            assert not await at.scaler.hold_lease("me", LEASE_S), f"renewed at {written}: it may well live"
            at.time.ahead_s += LEASE_S
            assert await at.scaler.hold_lease("me", LEASE_S)


async def test_of_many_that_try_at_once_one_gets_it(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(6)]
    async with KubernetesServer() as server, planner(server, tmp_path, holder="") as at:
        for _ in range(2):
            held = await asyncio.gather(*(at.scaler._lease.hold(name, LEASE_S) for name in names))
            assert sum(held) == 1
            assert server.store.get("leases", "slipstream-planner")["spec"]["holderIdentity"] == names[held.index(True)]
            await at.scaler.release_lease(names[held.index(True)])


async def test_a_renewal_whose_answer_was_lost_is_still_a_renewal(tmp_path: Path) -> None:
    async with KubernetesServer() as server, planner(server, tmp_path) as at:
        server.faults = [Fault("update", "leases", 500, done=True)]
        assert await at.scaler.hold_lease("one", LEASE_S)
        assert server.store.get("leases", "slipstream-planner")["spec"]["leaseTransitions"] == 0


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans()), min_size=1, max_size=30))
def test_a_holder_that_renews_within_its_time_never_loses_it(beats: list[tuple[float, bool]]) -> None:
    """Whatever its own clock says; and whoever is silent for the whole time loses it."""
    watch, now_s, heard_s, renewals = LeaseWatch(), 0.0, 0.0, 0
    for pause_s, renewed in beats:
        now_s += pause_s
        renewals += renewed
        spec = {"holderIdentity": "a", "leaseDurationSeconds": 10, "renewTime": datetime.fromtimestamp(renewals, UTC)}
        if renewed or not watch.seen:
            heard_s = now_s
        watch.look(spec, now_s)
        assert watch.held_by_another(spec, "b", now_s) == (now_s < heard_s + 10)
        assert not watch.held_by_another(spec, "a", now_s)
