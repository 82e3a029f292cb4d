"""The keeper beside a registry: real calls to a worker, what it tells, and what it does not do."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from planner.fence_keeper import FenceKeeper
from planner.fence_metrics import FenceCollector
from slipstream.v1 import worker_pb2, worker_pb2_grpc
from slipstream.v1.planner_pb2 import TrafficReport, WorkerSpeed
from slipstream.v1.registry_pb2 import HealthState, WorkerRecord, WorkerSet, WorkerState
from slipstream.worker_settings import HealthSettings
from tests.unit.planner.test_fencing import a_worker


class Worker(worker_pb2_grpc.WorkerServicer):
    """One that does as it is told, and whose record says so at once."""

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record

    async def SetFence(  # noqa: N802
        self, request: worker_pb2.SetFenceRequest, context: object
    ) -> WorkerRecord:
        assert request.epoch == self.record.epoch
        self.record.state = WorkerState.FENCED if request.fenced else WorkerState.READY
        self.record.health.fenced_because = request.because
        return self.record


@pytest.fixture
async def ill() -> AsyncIterator[WorkerRecord]:
    record = a_worker("ill", HealthState.SICK)
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(Worker(record), server)  # type: ignore[abstract]
    record.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield record
    await server.stop(None)


def page(keeper: FenceKeeper) -> list[str]:
    registry = CollectorRegistry()
    registry.register(FenceCollector(keeper))
    return generate_latest(registry).decode().splitlines()


async def test_a_sick_worker_is_told_to_be_fenced_and_to_be_free_when_it_is_well(ill: WorkerRecord) -> None:
    keeper = FenceKeeper(HealthSettings(), lambda: WorkerSet(workers=[a_worker("well"), ill], settled=True))
    await keeper.look()
    assert (ill.state, ill.health.fenced_because) == (WorkerState.FENCED, "ill fell off the bus")
    assert "slipstream_health_fenced_workers 1.0" in page(keeper)
    assert "slipstream_health_budget_left 3.0" in page(keeper)
    assert 'slipstream_registry_workers_by_health{health="sick",model="m",role="decode"} 1.0' in page(keeper)
    ill.health.state = HealthState.HEALTHY
    await keeper.look()
    assert ill.state == WorkerState.READY
    assert keeper.done == {("fence", "done"): 1, ("free", "done"): 1}


async def test_what_stays_in_service_is_a_figure(ill: WorkerRecord) -> None:
    keeper = FenceKeeper(HealthSettings(), lambda: WorkerSet(workers=[ill], settled=True))
    await keeper.look()
    assert ill.state == WorkerState.READY
    assert 'slipstream_health_sick_in_service{reason="last"} 1.0' in page(keeper)


async def test_nothing_is_done_while_not_all_workers_are_known(ill: WorkerRecord) -> None:
    keeper = FenceKeeper(HealthSettings(), lambda: WorkerSet(workers=[a_worker("well"), ill], settled=False))
    await keeper.look()
    assert ill.state == WorkerState.READY


async def test_a_worker_that_cannot_be_asked_is_counted_and_the_budget_is_not_spent() -> None:
    gone = a_worker("gone", HealthState.SICK)
    gone.address = "127.0.0.1:1"
    keeper = FenceKeeper(HealthSettings(), lambda: WorkerSet(workers=[a_worker("well"), gone], settled=True))
    await keeper.look()
    assert keeper.done == {("fence", "failed"): 1}
    assert keeper.left == 4


async def test_a_worker_that_frontends_saw_fall_behind_is_fenced(ill: WorkerRecord) -> None:
    ill.health.state = HealthState.HEALTHY
    now_s = 0.0
    records = [a_worker(f"well-{number}") for number in range(3)]
    keeper = FenceKeeper(
        HealthSettings(slow_for_s=60), lambda: WorkerSet(workers=[*records, ill], settled=True), clock=lambda: now_s
    )
    for _ in range(13):
        speeds = [
            WorkerSpeed(worker_id=one.worker_id, epoch=1, step_factor=2.5 if one is ill else 1.0, samples=9)
            for one in (*records, ill)
        ]
        keeper.take_report(TrafficReport(frontend_id="f", speeds=speeds))
        await keeper.look()
        now_s += 5.0
    assert ill.state == WorkerState.FENCED
    assert "2.5 times as long as its peers" in ill.health.fenced_because
    assert 'slipstream_health_slowness_ratio{worker="ill"} 2.5' in page(keeper)
