"""Simulations over gRPC: in a process of their own, one at a time, which ends with the question."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import psutil
import pytest

from planner.planner_service import LivePlanner
from planner.server import open_control_plane
from planner.what_if import WhatIf
from slipstream.errors import DeadlineError, InvalidRequestError, NoPolicyError, OverloadedError, UnavailableError
from slipstream.grpc_errors import from_rpc_error
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.planner_pb2 import GetPlanRequest, LoadSpec, RecommendRequest, SimulateRequest
from slipstream.v1.planner_pb2_grpc import PlannerStub
from tests.support.scripted_worker import until
from tests.support.stepped_planner import SteppedPlanner

if TYPE_CHECKING:
    from slipstream.v1.planner_pb2_grpc import PlannerAsyncStub

SIMULATOR = (sys.executable, "-P", "-m", "simulator.child")
LOAD = LoadSpec(rate_per_s=4.0, input_tokens=1000.0, output_tokens=20.0, requests=60)


@asynccontextmanager
async def served(
    command: tuple[str, ...] = SIMULATOR, live: LivePlanner | None = None
) -> AsyncIterator[PlannerAsyncStub]:
    async with (
        open_control_plane(ControlPlaneSettings(port=0), live, what_if=WhatIf(command)) as plane,
        grpc.aio.insecure_channel(plane.address) as channel,
    ):
        yield PlannerStub(channel)


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


async def error_of(call: object) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:  # type: ignore[attr-defined]
            pass
    return from_rpc_error(caught.value)


async def test_recommend_tells_each_pool_that_it_tried_and_then_the_answer() -> None:
    request = RecommendRequest(load=LOAD, profiles=["qwen3-32b-h200-tp1"], max_gpus=3)
    async with served() as stub:
        updates = [update async for update in stub.Recommend(request)]
    assert [update.WhichOneof("update") for update in updates] == ["tried"] * (len(updates) - 1) + ["result"]
    assert {update.tried.kind for update in updates[:-1]} == {"disaggregated", "aggregated"}
    result = updates[-1].result
    assert (result.better, result.aggregated.gpus, result.disaggregated.gpus) == ("aggregated", 1, 2)
    assert result.aggregated.meets
    assert result.aggregated.margin > 1.0
    assert "does with 1 GPU" in result.because


async def test_simulate_runs_the_policy_in_force_where_none_is_given() -> None:
    request = SimulateRequest(load=LOAD, profiles={"m": "qwen3-32b-h200-tp1"}, full=True)
    async with served(live=SteppedPlanner()) as stub:
        updates = [update async for update in stub.Simulate(request)]
    result = updates[-1].result
    assert (result.all.requests, result.all.failed) == (60, 0)
    assert [one.model for one in result.classes] == ["m"]
    assert result.gpu_hours > 0.0
    assert result.all.ttft.p99_s >= result.all.ttft.p50_s > 0.0
    assert len(json.loads(result.outcome_json)["outcome"]["workers"]) == 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SimulateRequest(policy_yaml="gpu_budget: 0", load=LOAD), "gpu_budget: must be greater than or equal to 1"),
        (
            SimulateRequest(policy_yaml="x", load=LoadSpec(rate_per_s=100.0, duration_s=86400.0)),
            "8,640,000 requests are more",
        ),
        (SimulateRequest(policy_yaml="x", profiles={"m": "/etc/passwd"}), "must be names of packaged profiles"),
    ],
    ids=["policy", "requests", "file"],
)
async def test_a_wrong_question_is_refused_by_name(request_: SimulateRequest, message: str) -> None:
    async with served() as stub:
        error = await error_of(stub.Simulate(request_))
    assert isinstance(error, InvalidRequestError)
    assert message in error.message


async def test_one_question_at_a_time_and_a_cancelled_one_ends_its_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(600)"
    async with served(script(code)) as stub:
        first = stub.Recommend(RecommendRequest())
        await until(lambda: pid_file.exists() and pid_file.read_text() != "")
        error = await error_of(stub.Recommend(RecommendRequest()))
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s
        assert isinstance(await error_of_plan(stub), NoPolicyError)  # the control plane answers meanwhile
        first.cancel()
        await until(lambda: not psutil.pid_exists(int(pid_file.read_text())))
        pid_file.unlink()
        assert isinstance(await error_of(stub.Recommend(RecommendRequest(), timeout=1.0)), DeadlineError)
        await until(lambda: not psutil.pid_exists(int(pid_file.read_text())))


async def error_of_plan(stub: PlannerAsyncStub) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetPlan(GetPlanRequest())
    return from_rpc_error(caught.value)


async def test_a_simulator_that_dies_or_is_not_there_is_told() -> None:
    async with served(script("raise SystemExit(3)")) as stub:
        error = await error_of(stub.Recommend(RecommendRequest()))
        assert isinstance(error, UnavailableError)
        assert "ended without an answer (status 3)" in error.message
        again = await error_of(stub.Recommend(RecommendRequest()))
        assert "status 3" in str(again)  # it is free for another
    for command in ((), ("/no/such/program",)):
        async with served(command) as stub:
            assert isinstance(await error_of(stub.Recommend(RecommendRequest())), UnavailableError)


async def test_a_question_left_alone_is_ended_when_the_control_plane_stops(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(600)"
    async with AsyncExitStack() as stack:
        async with open_control_plane(ControlPlaneSettings(port=0), what_if=WhatIf(script(code))) as plane:
            stub = PlannerStub(await stack.enter_async_context(grpc.aio.insecure_channel(plane.address)))
            reading = asyncio.create_task(error_of(stub.Recommend(RecommendRequest())))
            await until(lambda: pid_file.exists() and pid_file.read_text() != "")
        await until(lambda: not psutil.pid_exists(int(pid_file.read_text())))
        assert await reading
