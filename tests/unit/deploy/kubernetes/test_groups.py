"""Groups of a LeaderWorkerSet: one worker each, which is as well as the least of its pods."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.errors import UnavailableError
from slipstream.v1.registry_pb2 import Role
from tests.unit.deploy.kubernetes.world import World, world

DECODE = Role.ROLE_DECODE
PENDING_S = 300.0


async def workers(at: World) -> list[str]:
    return sorted(one.worker_id for one in await at.scaler.workers())


async def test_a_group_one_of_whose_followers_finds_no_room_is_waited_for_and_then_not_counted_on(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, leader_worker_sets=True, pending_s=PENDING_S) as at:
        at.server.controllers.room = 5
        group = at.server.add_leader_worker_set("decode", 2, size=3)
        assert await workers(at) == ["lws-decode-0", "lws-decode-1"], "a node may come"

        at.time.ahead_s = PENDING_S + 1
        assert await workers(at) == ["lws-decode-0"]
        with pytest.raises(UnavailableError, match=r"its follower lws-decode-1-2: it finds no room") as caught:
            await at.scaler.start("m", DECODE)
        assert (caught.value.code, group["spec"]["replicas"]) == ("no_room", 2)

        at.server.controllers.room = 6
        at.server.controllers.act()
        assert await workers(at) == ["lws-decode-0", "lws-decode-1"]


async def test_a_group_that_lost_a_followers_node_is_not_counted_on(tmp_path: Path) -> None:
    async with world(tmp_path, leader_worker_sets=True) as at:
        at.server.add_leader_worker_set("decode", 2, size=2)
        at.all_ready()
        follower = at.pod("lws-decode-1-1")
        follower["status"]["containerStatuses"] = [{"name": "slipstream", "started": True}]
        at.server.controllers.set_ready(follower, False)
        assert await workers(at) == ["lws-decode-0", "lws-decode-1"]

        at.time.ahead_s = 60
        assert await workers(at) == ["lws-decode-0"]


async def test_followers_that_are_still_ending_hold_up_no_group_that_was_made_anew(tmp_path: Path) -> None:
    async with world(tmp_path, leader_worker_sets=True) as at:
        at.server.controllers.room = 1
        at.server.controllers.deleted = lambda pod: None  # it takes its time
        at.server.add_leader_worker_set("decode", 1, size=2)
        at.pod("lws-decode-0-1")["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

        at.time.ahead_s = 10_000
        assert await workers(at) == ["lws-decode-0"]


async def test_only_seats_of_whole_groups_are_given_and_taken(tmp_path: Path) -> None:
    async with world(tmp_path, leader_worker_sets=True) as at:
        group = at.server.add_leader_worker_set("decode", 1, size=4)
        assert await at.scaler.start("m", DECODE) == "lws-decode-1"
        assert (group["spec"]["replicas"], len(at.server.pods())) == (2, 8)

        assert await at.scaler.drain("lws-decode-1") == "lws-decode-1"
        assert group["spec"]["replicas"] == 1
        assert await at.scaler.drain("lws-decode-0-1") == "lws-decode-0-1", "no worker: nothing is done"
        assert group["spec"]["replicas"] == 1
