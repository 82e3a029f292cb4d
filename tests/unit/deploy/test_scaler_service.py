"""A planner's scaler over gRPC, with the launcher's real supervisor and real processes that play workers."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from deploy.plan import CONTROL_PLANE, LocalCluster, plan
from deploy.progress import Progress
from deploy.scaler_service import PlannerLease, serving
from deploy.supervisor import RestartPolicy, Supervisor
from planner.remote_scaler import RemoteScaler
from planner.server import open_control_plane
from slipstream import config
from slipstream.background import background
from slipstream.errors import InvalidRequestError, UnavailableError
from slipstream.scaler import Reporter, SickWorker
from slipstream.v1.registry_pb2 import READY, ROLE_DECODE, ROLE_PREFILL, Role, WorkerRecord
from tests.support.scripted_worker import ScriptedWorker
from tests.unit.deploy.scripts import runs, until

# Plays every component: waits to be asked to end, and takes a moment over it.
PROGRAM = """#!/bin/sh
trap 'sleep 0.2; exit 0' TERM
: > "$0.$$"
while :; do sleep 0.05; done
"""


@dataclass(slots=True)
class Running:
    cluster: LocalCluster
    supervisor: Supervisor
    scaler: RemoteScaler
    output: io.StringIO

    async def roles(self) -> dict[str, Role.ValueType]:
        return {one.worker_id: one.role for one in await self.scaler.workers()}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="slipstream-test-") as name:
        yield Path(name)


@asynccontextmanager
async def running(folder: Path, *, ready: bool = True) -> AsyncIterator[Running]:
    program = folder / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    changed: dict[str, object] = {
        "frontend.http_port": 0,
        "frontend.grpc_port": 0,
        "control_plane.port": 0,
        "served_model_name": "m",
        "cluster.autoscale": True,
        "cluster.max_workers": 3,
        "planner.scaler": f"unix:{folder}/s",
    }
    settings = config.load(changed, {}, None).settings
    cluster = plan(settings, environ={}, run_folder=folder / "run", cpus=range(4), python=str(program))
    output = io.StringIO()
    progress = Progress(Console(file=output, width=200), [one.name for one in cluster.components])
    supervisor = Supervisor(
        cluster.components, report=progress, policy=RestartPolicy(first_delay_s=0.01), stop_timeout_s=10.0
    )
    async with supervisor, serving(cluster, supervisor), RemoteScaler(settings.planner.scaler, lambda: ()) as scaler:
        found = Running(cluster, supervisor, scaler, output)
        if not ready:
            yield found
            return
        async with background(_keep(supervisor), name="keep"):
            await until(lambda: supervisor.keeps)
            await until(lambda: all(Path(f"{program}.{pid}").exists() for pid in supervisor.pids().values()))
            yield found


async def _keep(supervisor: Supervisor) -> None:
    await supervisor.keep_running()


async def test_workers_come_and_go_within_the_room_there_is(folder: Path) -> None:
    async with running(folder) as one:
        assert await one.roles() == {"worker-0": ROLE_PREFILL, "worker-1": ROLE_DECODE}
        assert await one.scaler.start("m", ROLE_DECODE) == "worker-2"
        assert await one.roles() == {"worker-0": ROLE_PREFILL, "worker-1": ROLE_DECODE, "worker-2": ROLE_DECODE}
        pid = one.supervisor.pids()["worker-2"]
        assert runs(pid)
        with pytest.raises(UnavailableError, match="the most that this machine shall have") as caught:
            await one.scaler.start("m", ROLE_DECODE)
        assert caught.value.code == "no_room"
        await one.scaler.drain("worker-0")
        assert [each.worker_id for each in await one.scaler.workers() if each.ending] == ["worker-0"]
        await one.scaler.drain("worker-0")
        await until(lambda: "worker-0" not in {each.name for each in one.supervisor.components})
        assert set(await one.roles()) == {"worker-1", "worker-2"}
        await one.scaler.drain("worker-0")
        assert await one.scaler.start("m", ROLE_PREFILL) == "worker-3", "names are not used again"
    assert not runs(pid), "the launcher ends what a planner started, too"
    for line in ("worker-0: stopping", "worker-0: retired", "worker-3: starting"):
        assert line in one.output.getvalue()
    assert "restarted" not in one.output.getvalue()


async def test_people_are_told_when_a_worker_that_was_started_is_ready(folder: Path) -> None:
    async with running(folder) as one:
        settings = one.cluster.settings.control_plane
        async with open_control_plane(settings):
            await one.scaler.start("m", ROLE_DECODE)
            async with (
                ScriptedWorker(settings.address, ROLE_DECODE, "worker-2"),
                ScriptedWorker(settings.address, ROLE_DECODE, "worker-1"),
            ):
                await until(lambda: "worker-2: ready" in one.output.getvalue())
                assert one.output.getvalue().count("ready") == 1, "of the first ones it was said by who waited for them"


async def test_a_seat_is_one_workers_and_then_the_nexts(folder: Path) -> None:
    async with running(folder) as one:
        before = {each.name: (each.cpus, each.argv[-2:]) for each in one.supervisor.components}
        await one.scaler.start("m", ROLE_DECODE)
        cpus = [each.cpus for each in one.supervisor.components if each.name.startswith("worker")]
        assert len(set(cpus)) == 3, "no two share a CPU"
        assert sorted(sum(cpus, ())) == [0, 1, 2, 3]
        await one.scaler.drain("worker-1")
        await until(lambda: "worker-1" not in {each.name for each in one.supervisor.components})
        await one.scaler.start("m", ROLE_PREFILL)
        newest = one.supervisor.components[-1]
        assert (newest.name, newest.cpus) == ("worker-3", before["worker-1"][0])
        assert newest.argv[4] == "prefill-worker"


async def test_a_worker_that_dies_is_started_again_and_one_that_was_to_end_is_not(folder: Path) -> None:
    async with running(folder) as one:
        await one.scaler.start("m", ROLE_DECODE)
        first = one.supervisor.pids()["worker-2"]
        one.supervisor._running["worker-2"].kill()
        await until(lambda: one.supervisor.pids().get("worker-2", first) != first)
        one.supervisor.retire("worker-2")
        one.supervisor._running["worker-2"].kill()
        await until(lambda: "worker-2" not in {each.name for each in one.supervisor.components})
        await asyncio.sleep(0.1)
        assert "worker-2" not in one.supervisor.pids()


async def test_nobody_acts_before_the_cluster_is_ready(folder: Path) -> None:
    async with running(folder, ready=False) as one:
        assert not await one.scaler.hold_lease("one", 5.0)
        for refused in (one.scaler.start("m", ROLE_DECODE), one.scaler.drain("worker-1")):
            with pytest.raises(UnavailableError) as caught:
                await refused
            assert caught.value.code == "not_ready"


@pytest.mark.parametrize(
    ("model", "role", "param"), [("other", ROLE_DECODE, "model"), ("m", Role.ROLE_UNSPECIFIED, "role")]
)
async def test_what_cannot_be_started_is_refused(folder: Path, model: str, role: Role.ValueType, param: str) -> None:
    async with running(folder) as one:
        with pytest.raises(InvalidRequestError) as caught:
            await one.scaler.start(model, role)
        assert caught.value.param == param
        with pytest.raises(InvalidRequestError):
            await one.scaler.drain(CONTROL_PLANE)


async def test_a_planner_that_lost_the_lease_changes_nothing(folder: Path) -> None:
    async with running(folder) as one, RemoteScaler(one.cluster.settings.planner.scaler, lambda: ()) as other:
        assert await one.scaler.hold_lease("one", 0.1)
        assert not await other.hold_lease("two", 30.0)
        await asyncio.sleep(0.15)
        assert await other.hold_lease("two", 30.0)
        for refused in (one.scaler.start("m", ROLE_DECODE), one.scaler.drain("worker-1")):
            with pytest.raises(UnavailableError) as caught:
                await refused
            assert caught.value.code == "lease_lost"
        await other.release_lease("two")
        assert await one.scaler.hold_lease("one", 30.0)


async def test_a_role_is_changed_only_at_a_worker_that_is_ready(folder: Path) -> None:
    record = WorkerRecord(worker_id="worker-0", address="127.0.0.1:1", state=READY)
    async with RemoteScaler("unix:/nobody", lambda: (record,)) as scaler:
        with pytest.raises(UnavailableError, match="not there, or not ready"):
            await scaler.flip("worker-1", ROLE_DECODE)
        with pytest.raises(UnavailableError):
            await scaler.flip("worker-0", ROLE_DECODE)
        with pytest.raises(UnavailableError):
            await scaler.workers()


def test_the_lease_is_the_first_ones_until_it_falls_silent_or_gives_it_back() -> None:
    lease = PlannerLease()
    assert lease.hold("one", 5.0, 0.0)
    assert not lease.hold("two", 5.0, 4.9)
    assert lease.hold("one", 5.0, 4.9)
    assert lease.hold("two", 5.0, 9.9)
    lease.release("one")
    assert not lease.hold("one", 5.0, 10.0)
    lease.release("two")
    assert lease.hold("one", 5.0, 10.0)


def a_sick_one(worker_id: str, *, device: bool) -> SickWorker:
    return SickWorker(worker_id, "", ("GPU-a",), device, ("GPU 0 has fallen off the bus",))


@pytest.mark.parametrize("device", [True, False], ids=["its device is", "its process is"])
async def test_the_place_of_a_worker_whose_device_is_sick_stays_empty(folder: Path, device: bool) -> None:
    async with running(folder) as cluster:
        assert isinstance(cluster.scaler, Reporter)
        added = await cluster.scaler.start("m", ROLE_DECODE)
        for _ in range(2):
            await cluster.scaler.report(a_sick_one(added, device=device))
        await cluster.scaler.report(a_sick_one("nobody", device=True))
        await cluster.scaler.drain(added)
        await until(lambda: added not in {one.name for one in cluster.supervisor.components})
        assert cluster.output.getvalue().count("sick: GPU 0 has fallen off the bus") == 1
        if device:
            with pytest.raises(UnavailableError, match="whose device was sick"):
                await cluster.scaler.start("m", ROLE_DECODE)
        else:
            assert await cluster.scaler.start("m", ROLE_DECODE)
