"""The planner as its clients see it: over real gRPC, with the history and policy of a loop that the test steps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from planner.history import Outcome
from planner.objectives import ModelObjectives, Objective, PlannerObjectives
from planner.planner_service import UNREAD_REPORT_EVERY_S, LivePlanner
from planner.policy_file import dump_policy, parse_policy
from planner.scaling import Considered, Counts, Drain, Flip, Start
from planner.server import open_control_plane
from slipstream.errors import NoPolicyError, PolicyError, UnknownDecisionError
from slipstream.grpc_errors import from_rpc_error
from slipstream.settings import ControlPlaneSettings
from slipstream.v1.planner_pb2 import (
    ApplyRequest,
    ExplainRequest,
    GetPlanRequest,
    HistoryRequest,
    PlannerAction,
    TrafficReport,
)
from slipstream.v1.planner_pb2_grpc import PlannerStub
from slipstream.v1.registry_pb2 import ROLE_DECODE, ROLE_PREFILL
from tests.support.stepped_planner import POLICY, SteppedPlanner

if TYPE_CHECKING:
    from slipstream.v1.planner_pb2_grpc import PlannerAsyncStub


@asynccontextmanager
async def served(live: LivePlanner | None) -> AsyncIterator[PlannerAsyncStub]:
    async with (
        open_control_plane(ControlPlaneSettings(port=0), live) as plane,
        grpc.aio.insecure_channel(plane.address) as channel,
    ):
        yield PlannerStub(channel)


async def test_the_plan_shows_what_there_is_what_is_wanted_and_who_acts() -> None:
    live = SteppedPlanner()
    async with served(live) as stub:
        early = await stub.GetPlan(GetPlanRequest())
        assert [one.model for one in early.models] == ["m"]
        assert not early.HasField("latest")
        assert not early.models[0].HasField("target")
        live.step(1000.0)
        plan = await stub.GetPlan(GetPlanRequest())
    (model,) = plan.models
    assert (model.actual.prefill, model.actual.decode) == (1, 1)
    assert (model.target.prefill, model.target.decode) == (2, 1)
    assert (model.starting, model.draining) == (1, 1)
    assert (plan.leading, plan.holder, plan.dry_run) == (True, "planner-1", False)
    assert (plan.gpus_used, plan.gpu_budget) == (7, 8)
    assert parse_policy(plan.policy_yaml, "plan") == POLICY


async def test_a_decision_is_explained_with_its_numbers_and_what_was_considered() -> None:
    live = SteppedPlanner()
    considered = (
        Considered("m", Counts(1, 1), 4, 3.5, 0.04, "TTFT beyond 2 s"),
        Considered("m", Counts(2, 1), 6, 1.1, 0.04, "chosen"),
    )
    actions = (Start("m", ROLE_PREFILL), Flip("d0", ROLE_PREFILL), Drain("d2"))
    live.step(1000.0, *actions, reason="prefill is short", numbers={"rate_per_s": 3.5}, considered=considered)
    async with served(live) as stub:
        told = await stub.Explain(ExplainRequest())
    assert (told.number, told.reason, dict(told.numbers)) == (1, "prefill is short", {"rate_per_s": 3.5})
    assert [(one.counts.prefill, one.gpus, one.verdict) for one in told.considered] == [
        (1, 4, "TTFT beyond 2 s"),
        (2, 6, "chosen"),
    ]
    assert [(one.kind, one.model, one.worker_id, one.role) for one in told.actions] == [
        (PlannerAction.START, "m", "new-0", ROLE_PREFILL),
        (PlannerAction.FLIP, "", "new-1", ROLE_PREFILL),
        (PlannerAction.DRAIN, "", "new-2", 0),
    ]


async def test_a_failed_action_tells_why_and_one_not_tried_yet_is_there() -> None:
    live = SteppedPlanner()
    live.step(1000.0, Start("m", ROLE_DECODE), Start("m", ROLE_DECODE))
    live.history.done(1, [Outcome(error="no room")])
    async with served(live) as stub:
        told = await stub.Explain(ExplainRequest())
    assert [(one.worker_id, one.error) for one in told.actions] == [("", "no room"), ("", "")]


async def test_a_decision_is_found_by_its_time_and_by_its_number() -> None:
    live = SteppedPlanner()
    for unix_s in (1000.0, 1005.0, 1010.0):
        live.step(unix_s)
    async with served(live) as stub:
        assert (await stub.Explain(ExplainRequest(unix_s=1009.9))).number == 2
        assert (await stub.Explain(ExplainRequest(number=3))).unix_s == 1010.0
        for request in (ExplainRequest(unix_s=999.0), ExplainRequest(number=4), ExplainRequest(number=0)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Explain(request)
            error = from_rpc_error(caught.value)
            assert isinstance(error, UnknownDecisionError)
            assert "numbers 1 to 3" in error.message


async def test_history_is_bounded_and_the_latest_comes_first() -> None:
    live = SteppedPlanner(most_kept=4)
    for number in range(6):
        live.step(1000.0 + number, *([Drain("d2")] if number % 2 else []))
    async with served(live) as stub:
        everything = await stub.History(HistoryRequest())
        assert [one.number for one in everything.decisions] == [6, 5, 4, 3]
        assert everything.remembered == 4
        assert [one.number for one in (await stub.History(HistoryRequest(limit=2))).decisions] == [6, 5]
        assert [one.number for one in (await stub.History(HistoryRequest(since_unix_s=1004))).decisions] == [6, 5]
        assert [one.number for one in (await stub.History(HistoryRequest(acted_only=True))).decisions] == [6, 4]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.History(HistoryRequest(limit=1001))
        assert "at most 1000" in from_rpc_error(caught.value).message


async def test_another_policy_takes_effect_and_what_changes_is_told() -> None:
    live = SteppedPlanner()
    wanted = dump_policy(POLICY).replace("gpu_budget: 8", "gpu_budget: 16").replace("ttft_s: 2.0", "ttft_s: 1.5")
    async with served(live) as stub:
        tried = await stub.Apply(ApplyRequest(policy_yaml=wanted, dry_run=True))
        assert not tried.applied
        assert live.objectives == POLICY
        reply = await stub.Apply(ApplyRequest(policy_yaml=wanted))
        again = await stub.Apply(ApplyRequest(policy_yaml=wanted))
    assert reply.applied
    assert reply.changes == tried.changes
    assert [(one.setting, one.before, one.after) for one in reply.changes] == [
        ("gpu_budget", "8", "16"),
        ("models[m].objectives.realtime.ttft_s", "2.0", "1.5"),
    ]
    assert not again.changes
    assert live.objectives.gpu_budget == 16


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (dump_policy(POLICY).replace("gpu_budget: 8", "gpu_budget: -8"), "new.yaml:1: gpu_budget: must be greater"),
        (dump_policy(POLICY).replace("model: m", "model: m\n  profile: none"), "profile none: cannot be read"),
        ("", "new.yaml:1: the policy must be a mapping"),
    ],
)
async def test_a_wrong_policy_is_refused_and_nothing_changes(policy: str, message: str) -> None:
    live = SteppedPlanner()
    async with served(live) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Apply(ApplyRequest(policy_yaml=policy, name="new.yaml"))
    error = from_rpc_error(caught.value)
    assert isinstance(error, PolicyError)
    assert message in error.message
    assert live.objectives == POLICY


async def test_traffic_reports_reach_the_loop_and_the_wrong_ones_their_sender() -> None:
    live = SteppedPlanner()
    async with served(live) as stub:
        reply = await stub.ReportTraffic(TrafficReport(frontend_id="f"))
        assert reply.report_every_s == 1.0
        assert [(one.model, one.start_s) for one in reply.on_demand] == [("cold", 3.0)]
        assert [report.frontend_id for report in live.reports] == ["f"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ReportTraffic(TrafficReport())
    assert from_rpc_error(caught.value).param == "frontend_id"


async def test_a_control_plane_without_a_policy_says_so_and_takes_reports_seldom() -> None:
    async with served(None) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetPlan(GetPlanRequest())
        error = from_rpc_error(caught.value)
        assert isinstance(error, NoPolicyError)
        assert "--policy" in error.message
        assert (await stub.ReportTraffic(TrafficReport())).report_every_s == UNREAD_REPORT_EVERY_S


async def test_the_service_is_healthy_and_describes_itself() -> None:
    name = "slipstream.v1.Planner"
    async with (
        open_control_plane(ControlPlaneSettings(port=0)) as plane,
        grpc.aio.insecure_channel(plane.address) as channel,
    ):
        checked = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        asked = iter([ServerReflectionRequest(list_services="")])
        async for answer in ServerReflectionStub(channel).ServerReflectionInfo(asked):
            assert name in [service.name for service in answer.list_services_response.service]


def test_differences_are_told_by_model_not_by_place() -> None:
    from planner.policy_changes import policy_changes

    other = ModelObjectives("n", {"batch": Objective(60.0, 1.0)})
    before = PlannerObjectives((*POLICY.models, other), gpu_budget=8)
    swapped = PlannerObjectives((other, *POLICY.models), gpu_budget=8)
    assert policy_changes(before, swapped) == []
    gone = policy_changes(before, POLICY)
    assert gone
    assert all(one.setting.startswith("models[n].") and not one.after for one in gone)
