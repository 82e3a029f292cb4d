"""How a worker comes to know the ways from its peers: a real registry, and peers that a script measures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from engine import path_watch
from engine.host_process import _Host
from engine.path_watch import FIRST_RETRY_S, MAX_RETRY_S, PathWatch, Peer, PeerBook, fit_for_record
from planner.record_check import check_record
from planner.server import open_control_plane
from slipstream.background import background
from slipstream.errors import TransferError
from slipstream.settings import ControlPlaneSettings, Settings
from slipstream.v1.registry_pb2 import Role, TransferEndpoint, TransferPath, WorkerRecord
from slipstream.worker_settings import TransferSettings
from tests.support.scripted_worker import ScriptedWorker, until
from tests.unit.slipstream import scripted_registry

FAST, SLOW = 4e9, 100e6


@dataclass(slots=True)
class ScriptedProbe:
    """Measures nothing: says what a test wants to be found, and keeps what was asked."""

    errors: dict[str, list[str | Exception]] = field(default_factory=dict)
    warning: str = ""
    takes_s: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    async def __call__(self, worker_id: str, peer: TransferEndpoint, transport: str) -> TransferPath:
        assert transport == ""
        self.asked.append((worker_id, peer.epoch))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.takes_s)
        finally:
            self.under_way -= 1
        errors = self.errors.get(worker_id)
        error = errors.pop(0) if errors else ""
        if isinstance(error, Exception):
            raise error
        if error:
            return TransferPath(peer_worker_id=worker_id, peer_epoch=peer.epoch, error=error, measured_unix_s=1)
        return TransferPath(
            peer_worker_id=worker_id,
            peer_epoch=peer.epoch,
            transport="ucx" if self.warning else "shm",
            detail="tcp/eth0" if self.warning else "direct",
            bytes_per_s=SLOW if self.warning else FAST,
            latency_s=20e-6,
            warning=self.warning,
            measured_unix_s=1,
        )


@dataclass(slots=True)
class Watched:
    watch: PathWatch
    registry_address: str
    changes: list[list[tuple[str, int]]]

    def peers(self) -> list[tuple[str, int]]:
        return peers(self.watch.paths)


def peers(paths: tuple[TransferPath, ...]) -> list[tuple[str, int]]:
    return [(path.peer_worker_id, path.peer_epoch) for path in paths]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_watch, "PAUSE_S", 0.01)
    monkeypatch.setattr(path_watch, "FIRST_RETRY_S", 0.02)


async def nobody(keys: Collection[bytes]) -> None:
    """For tests in which no blocks are moved."""


@asynccontextmanager
async def watching(probe: ScriptedProbe, *, lease_s: float = 1.0) -> AsyncIterator[Watched]:
    """A decode worker's watch beside a control plane."""
    before = asyncio.all_tasks()
    async with open_control_plane(ControlPlaneSettings(port=0, lease_s=lease_s)) as plane:
        changes: list[list[tuple[str, int]]] = []
        watch = PathWatch(
            plane.address,
            role=Role.ROLE_DECODE,
            model="scripted",
            admit=nobody,
            probe=probe,
            on_change=lambda: changes.append(peers(watch.paths)),
        )
        async with background(watch.follow(), name="path-watch"):
            yield Watched(watch, plane.address, changes)
        assert probe.under_way == 0
    await until(lambda: not asyncio.all_tasks() - before)


def a_worker(
    address: str, worker_id: str, role: Role.ValueType = Role.ROLE_PREFILL, *, model: str = "scripted", epoch: int = 1
) -> ScriptedWorker:
    return ScriptedWorker(address, role, worker_id, model=model, epoch=epoch)


async def test_each_peer_that_comes_is_measured_once_and_the_registration_is_told() -> None:
    probe = ScriptedProbe()
    async with watching(probe) as watched, a_worker(watched.registry_address, "p0"):
        await until(lambda: watched.peers() == [("p0", 1)])
        async with a_worker(watched.registry_address, "p1"):
            await until(lambda: watched.peers() == [("p0", 1), ("p1", 1)])
            await asyncio.sleep(0.5)  # renewals, and sets with the same workers
            assert sorted(probe.asked) == [("p0", 1), ("p1", 1)]
            assert watched.changes == [[("p0", 1)], [("p0", 1), ("p1", 1)]]


async def test_a_peer_has_the_other_role_the_same_model_and_a_transfer_agent() -> None:
    probe = ScriptedProbe()
    async with watching(probe) as watched:
        address = watched.registry_address
        without_agent = a_worker(address, "p1")
        without_agent.record.ClearField("transfer")
        async with (
            a_worker(address, "d1", Role.ROLE_DECODE),
            a_worker(address, "p2", model="other"),
            without_agent,
            a_worker(address, "p0"),
        ):
            await until(lambda: watched.peers() == [("p0", 1)])
            without_agent.record.transfer.CopyFrom(TransferEndpoint(address="127.0.0.1:9", epoch=1))
            without_agent.registration.push()
            await until(lambda: watched.peers() == [("p0", 1), ("p1", 1)])
    assert sorted(probe.asked) == [("p0", 1), ("p1", 1)]


async def test_the_paths_of_peers_that_left_are_dropped_and_a_restarted_one_is_measured_again() -> None:
    probe = ScriptedProbe()
    async with watching(probe) as watched:
        async with a_worker(watched.registry_address, "p0"):
            await until(lambda: watched.peers() == [("p0", 1)])
        await until(lambda: watched.peers() == [])
        async with a_worker(watched.registry_address, "p0", epoch=2):
            await until(lambda: watched.peers() == [("p0", 2)])
    assert watched.changes == [[("p0", 1)], [], [("p0", 2)]]


async def test_one_way_is_measured_at_a_time() -> None:
    probe = ScriptedProbe(takes_s=0.05)
    async with watching(probe) as watched, AsyncExitStack() as stack:
        for index in range(3):
            await stack.enter_async_context(a_worker(watched.registry_address, f"p{index}"))
        await until(lambda: len(watched.watch.paths) == 3)
    assert probe.most_under_way == 1


async def test_a_way_that_does_not_work_is_told_and_measured_again_until_it_does() -> None:
    probe = ScriptedProbe(errors={"p0": ["refused", "refused"]})
    seen: list[str] = []
    async with watching(probe) as watched:
        with capture_logs() as logs:
            async with a_worker(watched.registry_address, "p0"):
                await until(lambda: [path.error for path in watched.watch.paths] == ["refused"])
                await until(lambda: [path.error for path in watched.watch.paths] == [""])
                seen += [entry["event"] for entry in logs if "peer" in entry]
    assert probe.asked == [("p0", 1)] * 3
    assert seen == ["no_path", "path_measured"], "each once, however often it was tried"


async def test_a_measurement_that_failed_here_says_nothing_of_the_way_and_is_repeated() -> None:
    lost = TransferError("the transfer agent gave no answer in 60 s", code="timeout")
    probe = ScriptedProbe(errors={"p0": [lost, lost]})
    async with watching(probe) as watched:
        with capture_logs() as logs:
            async with a_worker(watched.registry_address, "p0"):
                await until(lambda: len(watched.watch.paths) == 1)
                assert watched.watch.paths[0].error == ""
    told = [entry["event"] for entry in logs if entry["event"].startswith("path_")]
    assert told == ["path_not_measured", "path_measured"]
    assert watched.changes[0] == [("p0", 1)]


async def test_a_peer_that_never_answers_holds_up_the_others_only_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(path_watch, "PROBE_S", 0.1)
    probe = ScriptedProbe(takes_s=60)
    async with watching(probe) as watched, a_worker(watched.registry_address, "p0"):
        await until(lambda: len(probe.asked) > 1)
        probe.takes_s = 0
        await until(lambda: watched.peers() == [("p0", 1)])


async def test_a_slow_road_is_one_warning_that_names_the_setting() -> None:
    warning = "TCP, although this host has an RDMA device (mlx5_0): set UCX_TLS to all"
    probe = ScriptedProbe(warning=warning)
    async with watching(probe) as watched:
        with capture_logs() as logs:
            async with a_worker(watched.registry_address, "p0"):
                await until(lambda: len(watched.watch.paths) == 1)
    (entry,) = (entry for entry in logs if entry["event"] == "slow_path")
    assert (entry["log_level"], entry["peer"], entry["way"]) == ("warning", "p0", "ucx/tcp/eth0")
    assert (entry["warning"], entry["mb_per_s"]) == (warning, 100.0)


async def test_a_registry_that_restarts_costs_no_measurement() -> None:
    probe = ScriptedProbe()
    async with AsyncExitStack() as first, AsyncExitStack() as later:
        plane = await first.enter_async_context(open_control_plane(ControlPlaneSettings(port=0, lease_s=1.0)))
        watch = PathWatch(
            plane.address,
            role=Role.ROLE_DECODE,
            model="scripted",
            admit=nobody,
            probe=probe,
            on_change=lambda: None,
        )
        await later.enter_async_context(background(watch.follow(), name="path-watch"))
        await later.enter_async_context(a_worker(plane.address, "p0"))
        await until(lambda: peers(watch.paths) == [("p0", 1)])
        await first.aclose()
        port = int(plane.address.rpartition(":")[2])
        again = await later.enter_async_context(open_control_plane(ControlPlaneSettings(port=port, lease_s=1.0)))
        await until(lambda: watch._view.registry_id == again.service.registry_id and watch._view.settled)
        assert peers(watch.paths) == [("p0", 1)]
    assert probe.asked == [("p0", 1)]


@pytest.mark.parametrize("probe", [True, False])
async def test_a_worker_measures_only_if_it_is_told_to(probe: bool) -> None:
    measurer = ScriptedProbe()
    async with open_control_plane(ControlPlaneSettings(port=0, lease_s=1.0)) as plane:
        settings = Settings(transfer=TransferSettings(probe=probe))
        host = _Host(settings, Role.ROLE_DECODE, "d0")
        host._path_watch = PathWatch(
            plane.address,
            role=Role.ROLE_DECODE,
            model="scripted",
            admit=nobody,
            probe=measurer,
            on_change=lambda: None,
            measures=probe,
        )
        async with a_worker(plane.address, "p0"), host._measuring_paths():
            await asyncio.sleep(0.5)
            assert peers(tuple(host.record().paths)) == ([("p0", 1)] if probe else [])
    assert len(measurer.asked) == int(probe)


async def test_a_worker_that_takes_the_other_role_meets_its_new_peers_and_forgets_no_way() -> None:
    probe = ScriptedProbe()
    async with watching(probe) as watched:
        address = watched.registry_address
        async with a_worker(address, "p0"), a_worker(address, "d1", Role.ROLE_DECODE):
            await until(lambda: watched.peers() == [("p0", 1)])
            watched.watch.take_role(Role.ROLE_PREFILL)
            await until(lambda: watched.peers() == [("d1", 1), ("p0", 1)])
            watched.watch.take_role(Role.ROLE_DECODE)
            await asyncio.sleep(0.3)
    assert sorted(probe.asked) == [("d1", 1), ("p0", 1)], "a role that comes back finds its ways as they were measured"


def record(worker_id: str, epoch: int, role: Role.ValueType = Role.ROLE_PREFILL) -> WorkerRecord:
    endpoint = TransferEndpoint(address="h:1", epoch=epoch, transports=["shm"])
    return WorkerRecord(worker_id=worker_id, role=role, model="m", transfer=endpoint)


def found(peer: Peer, error: str = "") -> TransferPath:
    return TransferPath(peer_worker_id=peer.worker_id, peer_epoch=peer.epoch, transport="shm", error=error)


def meet(book: PeerBook, *records: WorkerRecord, now_s: float = 0.0) -> bool:
    return book.meet(records, Role.ROLE_DECODE, "m", now_s)


def test_retries_of_a_broken_way_come_later_and_later_but_never_stop() -> None:
    book, now_s, pauses_s = PeerBook(), 0.0, []
    meet(book, record("p0", 1))
    for _ in range(1100):
        ((peer, _),) = book.due(now_s)
        book.measured(peer, found(peer, "refused"), now_s)
        pauses_s.append(round(book.next_due_s() - now_s, 6))
        assert book.due(now_s) == []
        now_s = book.next_due_s()
    assert pauses_s == sorted(pauses_s)
    assert (pauses_s[0], pauses_s[-1]) == (path_watch.FIRST_RETRY_S, MAX_RETRY_S)
    assert FIRST_RETRY_S < MAX_RETRY_S


def test_what_was_measured_of_a_peer_that_has_left_meanwhile_is_not_kept() -> None:
    book = PeerBook()
    meet(book, record("p0", 1))
    ((peer, _),) = book.due(0)
    assert meet(book) is False, "nothing was known of it yet"
    assert book.measured(peer, found(peer), 0) is False
    assert book.paths() == ()


def a_long_story(worker_id: str, error: str = "") -> TransferPath:
    return fit_for_record(
        TransferPath(
            peer_worker_id=worker_id,
            peer_epoch=2**60,
            transport="ucx",
            detail="tcp/" + "eth0," * 30,
            bytes_per_s=1e9,
            latency_s=1e-6,
            warning="" if error else "line one\nline two\x1b[31m " + "and on " * 100,
            error=error,
            measured_unix_s=2**33,
        )
    )


def test_whatever_was_measured_fits_the_record_that_the_registry_takes() -> None:
    book = PeerBook()
    ids = [f"prefill-{'x' * 100}-{index}" for index in range(400)]
    meet(book, *(record(worker_id, 2**60) for worker_id in ids))
    for worker_id in ids:
        error = "refused: " + "the reason, " * 50 if worker_id == ids[-1] else ""
        book.measured(Peer(worker_id, 2**60), a_long_story(worker_id, error), 0)
    kept = book.paths()
    assert len(kept) > 30
    assert [path.peer_worker_id for path in kept if path.error] == [ids[-1]], "a way that does not work is told first"
    whole = scripted_registry.record("decode-0")
    whole.paths.extend(kept)
    check_record(whole)


steps = st.lists(
    st.one_of(
        st.sets(st.tuples(st.sampled_from("abc"), st.integers(1, 2)), max_size=3),
        st.sampled_from(["works", "broken", "unknown"]),
    ),
    max_size=30,
)


@given(steps)
def test_paths_are_always_of_peers_that_are_there_and_each_change_is_told(
    script: list[set[tuple[str, int]] | str],
) -> None:
    book, now_s = PeerBook(), 0.0
    there: set[tuple[str, int]] = set()
    for step in script:
        now_s += MAX_RETRY_S
        before = book.paths()
        if isinstance(step, set):
            there = step
            changed = meet(book, *(record(*peer) for peer in sorted(there)), now_s=now_s)
        else:
            due = book.due(now_s)
            peer = due[0][0] if due else Peer("gone", 1)
            path = None if step == "unknown" else found(peer, "" if step == "works" else "refused")
            changed = book.measured(peer, path, now_s)
        assert set(peers(book.paths())) <= there
        assert changed or book.paths() == before
        broken_or_new = there - {(p.peer_worker_id, p.peer_epoch) for p in book.paths() if not p.error}
        assert {(peer.worker_id, peer.epoch) for peer, _ in book.due(now_s + MAX_RETRY_S)} == broken_or_new
