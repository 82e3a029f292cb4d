"""What the live planner is made of, beside its registry and in a process of its own that stands by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest

from planner import live, profile_watch
from planner.live import Records, open_planner
from planner.loop import PlannerLoop
from planner.no_scaler import NoScaler
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.planner_service import UNREAD_REPORT_EVERY_S
from planner.policy_file import write_policy
from planner.server import open_control_plane
from planner.traffic import REPORT_EVERY_S
from planner.traffic_relay import MAX_WATCHERS, MOST_WAITING, TrafficRelay
from slipstream.errors import ConfigError, UnavailableError
from slipstream.performance import encode_profile
from slipstream.placement_settings import PlannerSettings
from slipstream.scaler import Scaler
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.planner_pb2 import TrafficPart, TrafficReport
from slipstream.v1.planner_pb2_grpc import PlannerStub
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerSet
from tests.support.scripted_worker import MODEL, ScriptedWorker, until
from tests.unit.frontend.router.workers import PROFILE

if TYPE_CHECKING:
    from slipstream.v1.planner_pb2_grpc import PlannerAsyncStub


GOOD = {"realtime": Objective(2.0, 0.05)}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    write_policy(PlannerObjectives((ModelObjectives(MODEL, GOOD),), gpu_budget=4, interval_s=0.5), path)
    return path


def settings(policy: Path, **more: object) -> PlannerSettings:
    return PlannerSettings.model_validate({"policy": policy, **more})


def report(sequence: int, arrivals: int = 1) -> TrafficReport:
    part = TrafficPart(model=MODEL, service_class="realtime", arrivals=arrivals)
    return TrafficReport(frontend_id="f", sequence=sequence, interval_s=1.0, parts=[part])


async def test_a_planner_that_could_do_nothing_is_not_started(policy: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        async with open_planner(settings(policy), WorkerSet, Path):
            pass
    assert caught.value.param == "planner.scaler"
    async with open_planner(settings(policy, dry_run=True), WorkerSet, Path) as loop:
        await until(lambda: loop.history.latest is not None)
        assert (loop.dry_run, loop.leading) == (True, False)


async def test_a_scaler_of_another_kind_goes_by_its_name_and_is_open_while_the_planner_plans(policy: Path) -> None:
    posted = WorkerSet(workers=[WorkerRecord(worker_id="w")])
    opened: list[str] = []

    @asynccontextmanager
    async def open_scaler(records: Records) -> AsyncIterator[Scaler]:
        opened.extend(one.worker_id for one in records())
        yield NoScaler()
        opened.append("closed")

    async with open_planner(settings(policy, scaler="other"), lambda: posted, Path, {"other": open_scaler}) as loop:
        await until(lambda: loop.history.latest is not None)
        assert opened == ["w"]
    assert opened == ["w", "closed"]
    with pytest.raises(ConfigError, match=r"'othr' is no address .* no scaler has that name \(other\)"):
        async with open_planner(settings(policy, scaler="othr"), lambda: posted, Path, {"other": open_scaler}):
            pass


async def test_a_profile_that_is_named_must_be_there_also_in_a_policy_that_comes_later(policy: Path) -> None:
    profile = policy.with_name("profile.json")
    wrong = PlannerObjectives((ModelObjectives(MODEL, GOOD, profile="nowhere.json"),), gpu_budget=4)
    async with open_planner(settings(policy, dry_run=True), WorkerSet, Path) as loop:
        with pytest.raises(ConfigError, match=r"nowhere\.json"):
            loop.apply(wrong)
        profile.write_bytes(encode_profile(PROFILE))
        loop.apply(PlannerObjectives((ModelObjectives(MODEL, GOOD, profile=str(profile)),), gpu_budget=4))
    write_policy(wrong, policy)
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        async with open_planner(settings(policy, dry_run=True), WorkerSet, Path):
            pass


@asynccontextmanager
async def standing_by(policy: Path) -> AsyncIterator[tuple[PlannerLoop, PlannerAsyncStub, str]]:
    """A planner that follows a control plane which has none, and that one's service."""
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(open_control_plane(ControlPlaneSettings(port=0, lease_s=1.0)))
        followed = settings(policy, dry_run=True, follow=plane.address)
        loop = await stack.enter_async_context(open_planner(followed, WorkerSet, Path))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(plane.address))
        yield loop, PlannerStub(channel), plane.address


async def test_a_planner_elsewhere_sees_the_workers_and_has_the_traffic_passed_on(policy: Path) -> None:
    async with standing_by(policy) as (loop, stub, address), ScriptedWorker(address, Role.ROLE_DECODE, "d0"):
        sequence = 0
        async with asyncio.timeout(20):
            while not loop.frontends:
                sequence += 1
                reply = await stub.ReportTraffic(report(sequence), timeout=5)
                await asyncio.sleep(0.05)
        assert reply.report_every_s == REPORT_EVERY_S, "somebody listens"
        await until(lambda: loop.seen is not None and len(loop.seen.workers) == 1)
        assert loop.seen is not None
        assert loop.seen.workers[0].worker_id == "d0"


async def test_frontends_are_told_to_report_seldom_where_nobody_listens() -> None:
    async with (
        open_control_plane(ControlPlaneSettings(port=0)) as plane,
        grpc.aio.insecure_channel(plane.address) as channel,
    ):
        reply = await PlannerStub(channel).ReportTraffic(report(1), timeout=5)
    assert reply.report_every_s == UNREAD_REPORT_EVERY_S


async def test_a_control_plane_that_restarts_is_followed_again(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WATCH_AGAIN_S", 0.05)
    monkeypatch.setattr(live, "RECONNECT_BACKOFF_S", 0.1)
    async with AsyncExitStack() as first, AsyncExitStack() as later:
        plane = await first.enter_async_context(open_control_plane(ControlPlaneSettings(port=0, lease_s=1.0)))
        followed = settings(policy, dry_run=True, follow=plane.address)
        loop = await later.enter_async_context(open_planner(followed, WorkerSet, Path))
        await later.enter_async_context(ScriptedWorker(plane.address, Role.ROLE_DECODE, "d0"))
        await until(lambda: loop.seen is not None and len(loop.seen.workers) == 1)
        await first.aclose()
        port = int(plane.address.rpartition(":")[2])
        await later.enter_async_context(open_control_plane(ControlPlaneSettings(port=port, lease_s=1.0)))
        stub = PlannerStub(await later.enter_async_context(grpc.aio.insecure_channel(plane.address)))
        sequence = 0
        async with asyncio.timeout(20):
            while not loop.frontends:
                sequence += 1
                await stub.ReportTraffic(report(sequence), timeout=5, wait_for_ready=True)
                await asyncio.sleep(0.05)
        assert loop.seen is not None
        assert [one.worker_id for one in loop.seen.workers] == ["d0"], "what was known stays known meanwhile"


async def test_a_slow_planner_loses_the_oldest_reports_and_slows_nobody_down() -> None:
    relay = TrafficRelay()
    slow = relay.watch()
    waiting = asyncio.ensure_future(anext(slow))
    await asyncio.sleep(0)
    for sequence in range(1, MOST_WAITING + 10):
        relay.publish(report(sequence))
    assert (await waiting).sequence < 11
    assert (await anext(slow)).sequence >= 9
    watches = [relay.watch() for _ in range(MAX_WATCHERS - 1)]
    others = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await anext(relay.watch())
    relay.close()
    assert all(isinstance(one, StopAsyncIteration) for one in await asyncio.gather(*others, return_exceptions=True))
    await slow.aclose()
    assert not relay.watched


async def test_workers_are_asked_how_fast_they_are_where_the_policy_does_not_say(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_watch, "LOOK_EVERY_S", 0.05)
    asked = []

    async def ask(record: object) -> object:
        asked.append(record)
        return PROFILE if len(asked) > 1 else None

    monkeypatch.setattr(profile_watch, "_ask", ask)
    async with open_control_plane(ControlPlaneSettings(port=0, lease_s=1.0)) as plane:
        service = plane.service
        async with (
            open_planner(settings(policy, dry_run=True), lambda: service.posted, Path) as loop,
            ScriptedWorker(plane.address, Role.ROLE_DECODE, "d0"),
        ):
            await until(lambda: len(asked) == 1)
            async with ScriptedWorker(plane.address, Role.ROLE_PREFILL, "p0"):
                await until(lambda: MODEL in loop._profiles)
            await asyncio.sleep(0.2)
    assert len(asked) == 2, "each worker once, and nobody any more once it is known"
