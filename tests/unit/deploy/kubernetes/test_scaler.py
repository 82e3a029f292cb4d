"""Workers as pods: what is started, which pod goes, and how the seats of the pools follow."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.kubernetes import scaler as scalers
from deploy.kubernetes.errors import AccessDeniedError
from slipstream.errors import UnavailableError
from slipstream.scaler import SickWorker
from slipstream.v1.registry_pb2 import Role
from tests.support.kubernetes_objects import is_ready, set_condition
from tests.support.kubernetes_server import Fault
from tests.support.scripted_worker import until
from tests.unit.deploy.kubernetes.world import World, planner, world

PREFILL, DECODE = Role.ROLE_PREFILL, Role.ROLE_DECODE


async def roles(at: World) -> dict[str, Role.ValueType]:
    return {one.worker_id: one.role for one in await at.scaler.workers() if not one.ending}


async def test_workers_are_the_pods_of_the_pools_by_their_names(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("prefill", 1, model="some/model:7b")
        at.server.add_deployment("decode", 2)
        workers = {one.worker_id: one for one in await at.scaler.workers()}
        assert sorted(workers) == at.names("decode") + at.names("prefill")
        (prefill,) = at.names("prefill")
        assert (workers[prefill].model, workers[prefill].role) == ("some/model:7b", PREFILL)
        assert workers[prefill].started_s > 1.7e9
        assert not any(one.ending for one in workers.values())


async def test_a_worker_more_is_a_seat_more_and_its_id_is_the_new_pods_name(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("prefill", 1)
        at.server.add_deployment("decode", 2)
        at.server.acts_after_s = 0.2
        before = at.names("decode")
        started = await at.scaler.start("m", DECODE)
        assert sorted([*before, started]) == at.names("decode")
        assert (at.seats("prefill"), at.seats("decode")) == (1, 3)
        assert started in await roles(at), "it is seen to start at once: nobody asks for it twice"


async def test_the_chosen_pod_goes_and_no_other_and_nothing_takes_its_place(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 4)
        at.all_ready()
        first, *others = at.names("decode")
        assert await at.scaler.drain(first) == first
        await asyncio.sleep(0.05)
        assert at.names("decode") == others, "the oldest, which Kubernetes would have kept longest"
        assert at.seats("decode") == 3
        assert ("delete", "pods") not in at.server.asked, "Kubernetes itself ends it"


async def test_a_pod_that_ends_is_told_so_and_asked_again_nothing_happens(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.controllers.deleted = lambda pod: None  # it takes its time
        at.server.add_deployment("decode", 2)
        at.all_ready()
        name, other = at.names("decode")
        await at.scaler.drain(name)
        await at.scaler.drain(name)
        assert at.seats("decode") == 1
        assert {one.worker_id: one.ending for one in await at.scaler.workers()} == {name: True, other: False}
        at.server.controllers.gone(at.pod(name))
        assert await at.scaler.drain(name) == name, "of one that is gone: nothing"
        assert await at.scaler.drain("unheard-of") == "unheard-of"
        assert at.seats("decode") == 1


async def test_a_running_pod_goes_and_not_the_one_that_starts_where_that_was_meant(tmp_path: Path) -> None:
    # Of one that runs and one that starts Kubernetes takes the one that starts, whatever the annotation says.
    async with world(tmp_path) as at:
        at.server.add_deployment("prefill", 2)
        at.all_ready()
        flipped, stays = at.names("prefill")
        started = await at.scaler.start("m", PREFILL)
        at.pod(started)["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        await at.scaler.drain(flipped)
        await asyncio.sleep(0.05)
        assert at.names("prefill") == sorted([stays, started])
        assert at.seats("prefill") == 2


async def test_a_pod_that_starts_goes_before_those_that_run(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("prefill", 2)
        at.all_ready()
        running = at.names("prefill")
        started = await at.scaler.start("m", PREFILL)
        await at.scaler.drain(started)
        await asyncio.sleep(0.05)
        assert (at.names("prefill"), at.seats("prefill")) == (running, 2)


async def test_where_another_pod_fails_and_goes_instead_the_chosen_one_goes_too_and_the_other_is_replaced(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 3)
        at.all_ready()
        chosen, unlucky, stays = at.names("decode")
        at.server.paused = True
        draining = asyncio.create_task(at.scaler.drain(chosen))
        await until(lambda: at.seats("decode") == 2)
        at.server.controllers.set_ready(at.pod(unlucky), False)
        at.server.controllers.act()
        at.server.paused = False
        await draining
        await until(lambda: len(at.names("decode")) == 2)
        assert stays in at.names("decode")
        assert not {chosen, unlucky} & set(at.names("decode"))
        assert at.seats("decode") == 2


async def test_whatever_went_before_the_chosen_pod_goes_and_every_ready_one_stays(tmp_path: Path) -> None:
    chance = random.Random(6)
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 3)
        for _ in range(40):
            happens = chance.choice(("start", "ready", "unready", "drain", "drain"))
            names = at.names("decode")
            if happens == "start" and len(names) < 6:
                assert await at.scaler.start("m", DECODE) in at.names("decode")
            elif happens == "drain" and names:
                chosen = chance.choice(names)
                ready = {one for one in names if is_ready(at.pod(one))}
                assert await at.scaler.drain(chosen) == chosen
                at.server.controllers.act()
                left = set(at.names("decode"))
                assert chosen not in left
                assert ready - {chosen} <= left
                assert len(left) == at.seats("decode") == len(names) - 1
            elif names:
                at.server.controllers.set_ready(at.pod(chance.choice(names)), happens == "ready")


async def test_seats_are_of_pools_and_roles_are_of_workers(tmp_path: Path) -> None:
    """A prefill pod that serves decode keeps its seat: whoever drains it takes the seat from `prefill`, and a decode
    worker more is a seat in `decode`. Their sum is the number of workers throughout."""
    async with world(tmp_path) as at:
        at.server.add_deployment("prefill", 3)
        at.server.add_deployment("decode", 1)
        at.all_ready()
        flipped, *_ = at.names("prefill")
        await at.scaler.drain(flipped)  # it serves decode by now, by the registry's word
        assert (at.seats("prefill"), at.seats("decode")) == (2, 1)
        started = await at.scaler.start("m", DECODE)
        assert started in at.names("decode")
        assert (at.seats("prefill"), at.seats("decode")) == (2, 2)
        await until(lambda: len(at.server.pods()) == at.seats("prefill") + at.seats("decode"))


async def test_of_several_pools_of_a_role_the_first_with_room_gets_the_worker(tmp_path: Path) -> None:
    most = {"slipstream.dev/max-replicas": "1"}
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 1, name="decode-a100", annotations=most)
        at.server.add_deployment("decode", 0, name="decode-l4", annotations=most)
        at.server.add_deployment("decode", 1, name="other", model="other")
        assert await at.scaler.start("m", DECODE) in at.names("decode-l4")
        with pytest.raises(UnavailableError, match="the most it may have") as full:
            await at.scaler.start("m", DECODE)
        assert full.value.code == "no_room"
        with pytest.raises(UnavailableError, match=r"slipstream-other \(ROLE_DECODE other\)") as none:
            await at.scaler.start("m", PREFILL)
        assert none.value.code == "no_pool"


async def test_a_pod_without_room_is_counted_on_for_a_while_and_then_nothing_more_is_asked_for(tmp_path: Path) -> None:
    async with world(tmp_path, pending_s=60.0) as at:
        at.server.controllers.room = 1
        at.server.add_deployment("decode", 1)
        waiting = await at.scaler.start("m", DECODE)
        assert waiting in await roles(at), "a node may be on its way"
        at.time.ahead_s = 61.0
        assert waiting not in await roles(at)
        with pytest.raises(UnavailableError, match=r"Insufficient nvidia\.com/gpu") as caught:
            await at.scaler.start("m", DECODE)
        assert (caught.value.code, at.seats("decode")) == ("no_room", 2)
        at.server.controllers.room = 2
        at.server.controllers.act()
        set_condition(at.pod(waiting), "PodScheduled", True)
        assert waiting in await roles(at), "it counts again once it has a node"


async def test_a_pod_that_cannot_start_is_no_worker_that_comes(tmp_path: Path) -> None:
    async with world(tmp_path, pending_s=60.0) as at:
        at.server.add_deployment("decode", 1)
        (name,) = at.names("decode")
        state = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
        at.pod(name)["status"]["containerStatuses"] = [{"name": "worker", "restartCount": 0, "state": state}]
        assert name in await roles(at)
        at.time.ahead_s = 61.0
        assert name not in await roles(at)
        with pytest.raises(UnavailableError, match="container worker: ImagePullBackOff: no such tag"):
            await at.scaler.start("m", DECODE)


async def test_a_pod_whose_node_is_lost_is_not_taken_for_one_that_comes(tmp_path: Path) -> None:
    # Kubernetes ends it only five minutes later, and makes another one then.
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 2)
        starting, lost = at.names("decode")
        pod = at.pod(lost)
        pod["status"]["containerStatuses"] = [{"name": "worker", "restartCount": 0, "started": True}]
        at.server.controllers.set_ready(pod)
        at.server.controllers.set_ready(pod, False)
        assert sorted(await roles(at)) == [starting, lost]
        at.time.ahead_s = scalers.LOST_AFTER_S + 1
        assert list(await roles(at)) == [starting]
        at.server.controllers.set_ready(pod)
        assert sorted(await roles(at)) == [starting, lost]


async def test_a_seat_for_which_no_pod_is_made_is_given_back_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scalers, "APPEARS_WITHIN_S", 0.3)
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 1)
        at.server.controllers.quota = 1
        with pytest.raises(UnavailableError, match="exceeded quota: gpus") as caught:
            await at.scaler.start("m", DECODE)
        assert (caught.value.code, at.seats("decode")) == ("no_pod", 1)


async def test_pods_that_are_over_are_no_workers_and_are_not_drained(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 2)
        evicted, _ = at.names("decode")
        at.server.controllers.fail(at.pod(evicted))
        at.server.controllers.act()
        assert evicted not in await roles(at)
        assert len(await roles(at)) == 2, "its pool has replaced it"
        await at.scaler.drain(evicted)
        assert at.seats("decode") == 2


async def test_the_last_group_of_a_leader_worker_set_goes_whichever_was_meant(tmp_path: Path) -> None:
    async with world(tmp_path, leader_worker_sets=True) as at:
        group = at.server.add_leader_worker_set("decode", 2, size=2)
        assert sorted(await roles(at)) == ["lws-decode-0", "lws-decode-1"], "a group is one worker: its leader"
        assert await at.scaler.start("m", DECODE) == "lws-decode-2"
        assert await at.scaler.drain("lws-decode-0") == "lws-decode-2"
        assert group["spec"]["replicas"] == 2
        await until(lambda: "lws-decode-2" not in at.server.store.objects["pods"])
        assert sorted(await roles(at)) == ["lws-decode-0", "lws-decode-1"]


async def test_a_sick_group_goes_itself_and_keeps_its_seat(tmp_path: Path) -> None:
    async with world(tmp_path, leader_worker_sets=True) as at:
        group = at.server.add_leader_worker_set("decode", 3, size=2)
        sick = at.server.store.objects["pods"]["lws-decode-0"]["metadata"]["uid"]
        await at.scaler.report(SickWorker("lws-decode-0", "node-1", (), device=True, reasons=("Xid 79",)))
        assert await at.scaler.drain("lws-decode-0") == "lws-decode-0"
        assert group["spec"]["replicas"] == 3

        def made_anew() -> bool:
            pod = at.server.store.objects["pods"].get("lws-decode-0")
            return pod is None or pod["metadata"]["uid"] != sick

        await until(made_anew)
        assert {"lws-decode-1", "lws-decode-2"} <= set(await roles(at))


async def test_a_drain_that_is_refused_leaves_the_pod_as_it_was(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 2)
        at.all_ready()
        name, _ = at.names("decode")
        at.server.denied.add(("patch", "deployments/scale"))
        with pytest.raises(AccessDeniedError):
            await at.scaler.drain(name)
        assert at.pod(name)["metadata"]["annotations"] == {}
        assert (at.seats("decode"), len(await roles(at))) == (2, 2)


async def test_a_planner_that_died_in_the_middle_leaves_a_pod_that_counts_again_later(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 2)
        at.all_ready()
        name, _ = at.names("decode")
        at.server.faults.append(Fault("get", "deployments/scale", delay_s=0.2))
        draining = asyncio.create_task(at.scaler.drain(name))
        await until(lambda: at.server.asked["get", "deployments/scale"])
        draining.cancel()
        await asyncio.wait([draining])
        assert name not in await roles(at)
        at.time.ahead_s = scalers.CHOSEN_S
        assert name in await roles(at)
        await at.scaler.drain(name)
        assert (at.seats("decode"), name in at.names("decode")) == (1, False)


async def test_a_seat_that_somebody_else_took_away_meanwhile_is_not_taken_twice(tmp_path: Path) -> None:
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 3)
        at.all_ready()
        name, *_ = at.names("decode")
        at.server.paused = True
        at.server.store.patch("deployments", "slipstream-decode", {"spec": {"replicas": 2}})
        await at.scaler.drain(name)
        assert at.seats("decode") == 2
        assert name not in at.names("decode")


async def test_who_holds_no_lease_or_has_lost_it_does_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, holder="") as at:
        at.server.add_deployment("decode", 1)
        with pytest.raises(UnavailableError) as never:
            await at.scaler.start("m", DECODE)
        assert never.value.code == "lease_lost"
        assert await at.scaler.hold_lease("one", 5.0)
        at.time.ahead_s = 3.0
        await at.scaler.start("m", DECODE)
        assert at.server.asked["update", "leases"] == 1, "renewed on the way, because half of it was over"
        lease = at.server.store.get("leases", "slipstream-planner")
        at.server.store.patch("leases", "slipstream-planner", {"spec": {"holderIdentity": "two", "renewTime": "x"}})
        at.time.ahead_s = 6.0
        for action in (at.scaler.start("m", DECODE), at.scaler.drain("any"), at.scaler.flip("any", DECODE)):
            with pytest.raises(UnavailableError) as lost:
                await action
            assert lost.value.code == "lease_lost"
        assert lease["spec"]["holderIdentity"] == "two"
        assert at.seats("decode") == 2


async def test_a_sick_workers_pod_is_marked_and_its_node_takes_nothing_new_where_allowed(
    tmp_path: Path,
) -> None:
    sick = SickWorker("gone", "node-1", ("GPU-1",), device=True, reasons=("Xid 79: fallen off the bus", "slow"))
    kubelets = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
    async with world(tmp_path) as at:
        at.server.add_deployment("decode", 1)
        (name,) = at.names("decode")
        node = at.server.store.create("nodes", {"metadata": {"name": "node-1"}, "spec": {"taints": [kubelets]}})
        await at.scaler.report(replace(sick, worker_id=name))
        assert at.pod(name)["metadata"]["annotations"] == {"slipstream.dev/sick": "Xid 79: fallen off the bus; slow"}
        assert node["spec"]["taints"] == [kubelets]
        await at.scaler.report(sick)
        async with planner(at.server, tmp_path, holder="", taint_nodes=True) as allowed:
            at.server.faults = [Fault("patch", "nodes", 409)]
            for worker_id in (name, name, "gone"):
                await allowed.scaler.report(replace(sick, worker_id=worker_id))
            ours = {"key": "slipstream.dev/sick", "value": "device", "effect": "NoSchedule"}
            assert node["spec"]["taints"] == [kubelets, ours]
            await allowed.scaler.report(replace(sick, node="gone"))
            at.server.denied.add(("get", "nodes"))
            with pytest.raises(AccessDeniedError, match="Missing in the ClusterRole"):
                await allowed.scaler.report(sick)
            await allowed.scaler.report(replace(sick, device=False))
