"""The laws of the registry's soft state."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from planner.record_check import check_record
from planner.registry import Change, Registry
from slipstream.errors import InvalidRequestError, UnavailableError
from slipstream.record_limits import MAX_RECORD_BYTES
from slipstream.v1.registry_pb2 import (
    Health,
    HealthReason,
    Load,
    Role,
    Startup,
    TransferEndpoint,
    TransferPath,
    WorkerRecord,
    WorkerState,
)

LEASE_S = 10.0


def a_record(worker_id: str = "w", epoch: int = 1, **fields: Any) -> WorkerRecord:
    record = WorkerRecord(
        worker_id=worker_id,
        role=Role.ROLE_DECODE,
        state=WorkerState.READY,
        model="m",
        address="127.0.0.1:7000",
        epoch=epoch,
    )
    record.MergeFrom(WorkerRecord(**fields))
    return record


def a_registry() -> Registry:
    return Registry(lease_s=LEASE_S, started_at_s=0.0)


class RegistryLaws(RuleBasedStateMachine):
    """Any order of registrations, farewells and silence, against a model that remembers everything."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.registry = a_registry()
        self.newest: dict[str, int] = {}
        self.renewed_s: dict[str, float] = {}
        self.left: dict[str, tuple[int, float]] = {}

    ids = st.sampled_from(["a", "b", "c"])
    epochs = st.integers(1, 5)
    # Eighths of a second add up exactly: a rounding error must not decide on which side of a limit a step falls.
    awake_s = st.integers(1, int(LEASE_S / 2 * 8)).map(lambda eighths: eighths / 8)
    asleep_s = st.integers(int(LEASE_S / 2 * 8) + 1, 8000).map(lambda eighths: eighths / 8)

    @rule(worker_id=ids, epoch=epochs)
    def register(self, worker_id: str, epoch: int) -> None:
        left_epoch, _ = self.left.get(worker_id, (0, 0.0))
        stale = epoch < self.newest.get(worker_id, 0) or epoch <= left_epoch
        if stale:
            with pytest.raises(InvalidRequestError) as caught:
                self.registry.register(a_record(worker_id, epoch), self.now_s)
            assert caught.value.code == "stale_epoch"
        else:
            self.registry.register(a_record(worker_id, epoch), self.now_s)
            self.newest[worker_id], self.renewed_s[worker_id] = epoch, self.now_s
            self.left.pop(worker_id, None)

    @rule(worker_id=ids, epoch=epochs)
    def deregister(self, worker_id: str, epoch: int) -> None:
        change = self.registry.deregister(worker_id, epoch, self.now_s)
        if self.newest.get(worker_id, 0) > epoch:
            assert change is Change.NOTHING
            return
        assert (change is Change.WORKERS) == (worker_id in self.newest)
        self.left[worker_id] = (max(epoch, self.left.get(worker_id, (0, 0.0))[0]), self.now_s)
        self.newest.pop(worker_id, None)
        self.renewed_s.pop(worker_id, None)

    @rule(step_s=awake_s)
    def time_passes(self, step_s: float) -> None:
        self.now_s += step_s
        gone = {record.worker_id for record in self.registry.advance(self.now_s)}
        due = {name for name, at_s in self.renewed_s.items() if at_s + LEASE_S <= self.now_s}
        assert gone == due
        for name in due:
            del self.newest[name], self.renewed_s[name]
        self.left = {name: left for name, left in self.left.items() if left[1] + LEASE_S > self.now_s}

    @precondition(lambda self: self.newest)
    @rule(step_s=asleep_s)
    def the_process_sleeps(self, step_s: float) -> None:
        self.now_s += step_s
        assert self.registry.advance(self.now_s) == ()
        assert not self.registry.settled(self.now_s)
        self.renewed_s = dict.fromkeys(self.renewed_s, self.now_s)

    @invariant()
    def who_is_there_is_who_renewed(self) -> None:
        assert {record.worker_id: record.epoch for record in self.registry.records()} == self.newest


TestRegistryLaws = RegistryLaws.TestCase


@given(st.floats(0, LEASE_S, exclude_max=True), st.floats(LEASE_S, 1e6))
def test_a_registry_is_settled_after_one_lease_period(before_s: float, after_s: float) -> None:
    assert not a_registry().settled(before_s)
    assert a_registry().settled(after_s)


def test_renewal_with_other_load_is_a_change_of_load_only() -> None:
    registry = a_registry()
    assert registry.register(a_record(), 0) is Change.WORKERS
    assert registry.register(a_record(), 1) is Change.NOTHING
    assert registry.register(a_record(load=Load(running=3)), 2) is Change.LOAD
    assert registry.register(a_record(load=Load(running=3), renewals=9), 3) is Change.LOAD
    paths = [TransferPath(peer_worker_id="p", transport="shm", bytes_per_s=1e9)]
    assert registry.register(a_record(load=Load(running=3), renewals=9, paths=paths), 4) is Change.LOAD
    assert registry.register(a_record(load=Load(running=3), renewals=9, paths=paths), 5) is Change.NOTHING


def test_a_transfer_agent_that_comes_or_moves_is_a_change_of_workers() -> None:
    registry = a_registry()
    registry.register(a_record(), 0)
    there = TransferEndpoint(address="h:1", epoch=1, transports=["shm"])
    assert registry.register(a_record(transfer=there), 1) is Change.WORKERS
    there = TransferEndpoint(address="h:1", epoch=2, transports=["shm"])
    assert registry.register(a_record(transfer=there), 2) is Change.WORKERS
    assert registry.register(a_record(state=WorkerState.DRAINING), 4) is Change.WORKERS
    assert registry.register(a_record(epoch=2), 5) is Change.WORKERS


def test_a_renewal_on_its_way_does_not_bring_back_a_worker_that_left() -> None:
    registry = a_registry()
    registry.register(a_record(epoch=4), 0)
    registry.deregister("w", 4, 1)
    with pytest.raises(InvalidRequestError, match="taken its leave"):
        registry.register(a_record(epoch=4), 1.1)
    assert registry.register(a_record(epoch=5), 1.2) is Change.WORKERS


def test_a_full_registry_refuses_newcomers_and_keeps_renewing_the_others() -> None:
    registry = Registry(lease_s=LEASE_S, started_at_s=0, max_workers=2)
    registry.register(a_record("a"), 0)
    registry.register(a_record("b"), 0)
    with pytest.raises(UnavailableError, match="limit is 2"):
        registry.register(a_record("c"), 0)
    assert registry.register(a_record("a"), 1) is Change.NOTHING


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "host.name:65535", "[::1]:7000", "[fe80::1%eth0]:7000", "worker-1:80", "a_b:80"]
)
def test_addresses_as_they_are_used_are_accepted(address: str) -> None:
    check_record(a_record(address=address))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *[
            ({"address": address}, "address")
            for address in (
                "host",
                ":80",
                "h:0",
                "h:65536",
                "h:x",
                "a b:80",
                "unix:/x",
                "::1:80",
                "h:80/x",
                "h:80\n",
            )
        ],
        ({"worker_id": "x" * 129}, "worker_id"),
        ({"worker_id": "a\nb"}, "worker_id"),
        ({"worker_id": "-rf"}, "worker_id"),
        ({"model": "m" * 257}, "model"),
        ({"model": "a\x1b[2J"}, "model"),
        ({"metrics_url": "file:///etc/passwd"}, "metrics_url"),
        ({"host_id": "h" * 257}, "host_id"),
        ({"device": "cuda; rm"}, "device"),
        ({"role": 7}, "role"),
        ({"state": 9}, "state"),
        ({"host_id": "h" * MAX_RECORD_BYTES}, "worker"),
        ({"transfer": TransferEndpoint(address="nowhere", epoch=1)}, "transfer.address"),
        ({"transfer": TransferEndpoint(address="h:1", transports=["shm"] * 9)}, "transfer.transports"),
        ({"transfer": TransferEndpoint(address="h:1", transports=["\x1b[2J"])}, "transfer.transports"),
        ({"transfer": TransferEndpoint(address="h:1", ranks=["h:2", "h:1"])}, "transfer.ranks"),
        ({"transfer": TransferEndpoint(address="h:1", ranks=["h:1"] * 65)}, "transfer.ranks"),
        ({"transfer": TransferEndpoint(address="h:1", ranks=["h:1", "nowhere"])}, "transfer.ranks"),
        ({"node": "n" * 254}, "node"),
        ({"startup": Startup(weights=-1.0)}, "startup.weights"),
        ({"startup": Startup(total=float("nan"))}, "startup.total"),
        ({"health": Health(reasons=[HealthReason(code="c")] * 17)}, "health"),
        ({"health": Health(reasons=[HealthReason(code="c", text="a\nb")])}, "health.reasons.text"),
        ({"health": Health(fenced_because="f" * 241)}, "health.fenced_because"),
        ({"health": Health(device_ids=["\x1b[2J"])}, "health.device_ids"),
        ({"paths": [TransferPath(peer_worker_id="a\nb")]}, "paths.peer_worker_id"),
        ({"paths": [TransferPath(peer_worker_id="p", detail="d" * 65)]}, "paths.detail"),
        ({"paths": [TransferPath(peer_worker_id="p", warning="a\x1b[2J")]}, "paths.warning"),
        ({"paths": [TransferPath(peer_worker_id="p", error="e" * 241)]}, "paths.error"),
        ({"paths": [TransferPath(peer_worker_id="p", error="e" * 240)] * 110}, "paths"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_records_are_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_record(a_record(**fields))
    assert caught.value.param == param
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("missing", ["worker_id", "role", "state", "model", "address", "epoch"])
def test_incomplete_records_are_refused(missing: str) -> None:
    record = a_record()
    record.ClearField(missing)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as caught:
        check_record(record)
    assert caught.value.param == missing
