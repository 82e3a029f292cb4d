"""The planner over gRPC: what it wants and why, what it decided, and another policy from the next decision on.

It shows a running loop (`LivePlanner`) and changes nothing in it but the policy.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import grpc.aio
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from planner.history import History, Made
from planner.objectives import PlannerObjectives
from planner.observation import Observation
from planner.plan_messages import decision_message, plan_message
from planner.policy_changes import policy_changes
from planner.policy_file import dump_policy, parse_policy
from planner.traffic import REPORT_EVERY_S
from planner.traffic_relay import TrafficRelay
from planner.what_if import MOST_TIMEOUT_S, Answer, WhatIf
from slipstream import telemetry
from slipstream.errors import (
    ConfigError,
    InvalidRequestError,
    NoPolicyError,
    PolicyError,
    SlipstreamError,
    UnknownDecisionError,
)
from slipstream.grpc_errors import abort
from slipstream.v1.planner_pb2 import (
    ApplyReply,
    ApplyRequest,
    ExplainRequest,
    GetPlanRequest,
    HistoryReply,
    HistoryRequest,
    Plan,
    PlannerDecision,
    PolicyChange,
    PoolFigures,
    RecommendRequest,
    RecommendResult,
    RecommendUpdate,
    SimulateProgress,
    SimulateRequest,
    SimulateResult,
    SimulateUpdate,
    TrafficReply,
    TrafficReport,
    WatchTrafficRequest,
)
from slipstream.v1.planner_pb2_grpc import PlannerServicer

log = telemetry.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

HISTORY_LIMIT = 100
MOST_HISTORY = 1000
MAX_NAME_CHARS = 256
UNREAD_REPORT_EVERY_S = 30.0
"""How often frontends report where nobody plans: often enough for a planner that comes later."""


SPEEDS_EVERY_S = 5.0
"""How often they report where nobody plans, and sick workers are fenced."""


class LivePlanner(Protocol):
    """The loop that decides, as the service sees it.

    Attributes:
        objectives: in force.
        history: of its decisions.
        leading: it holds the scaler's lease and acts.
        holder: its name in the lease.
        dry_run: it decides and does nothing.
        seen: its last look at the cluster; none before the first.
    """

    @property
    def objectives(self) -> PlannerObjectives: ...

    @property
    def history(self) -> History: ...

    @property
    def leading(self) -> bool: ...

    @property
    def holder(self) -> str: ...

    @property
    def dry_run(self) -> bool: ...

    @property
    def seen(self) -> Observation | None: ...

    def take_report(self, report: TrafficReport) -> float:
        """What a frontend counted; returns in how many seconds it shall tell more.

        Raises:
            InvalidRequestError: it is misshapen.
        """
        ...

    def on_demand(self) -> Mapping[str, float]:
        """The models that it starts from zero, and what that takes in seconds."""
        ...

    def apply(self, objectives: PlannerObjectives, *, dry_run: bool = False) -> None:
        """Decide by these from the next decision on; with `dry_run` only tell whether they would do.

        Raises:
            ConfigError: they name a profile that cannot be read, or what this planner cannot scale.
        """
        ...


class PlannerService(PlannerServicer):
    """Serves one planner; `live` is none where the control plane has no scaling policy.

    Args:
        take_speeds: told of each report, for what frontends saw of the workers' speed.
    """

    def __init__(
        self,
        live: LivePlanner | None,
        what_if: WhatIf | None = None,
        take_speeds: Callable[[TrafficReport], None] | None = None,
    ) -> None:
        self._live = live
        self._take_speeds = take_speeds
        self._what_if = what_if or WhatIf()
        self._relay = TrafficRelay()

    async def ReportTraffic(self, request: TrafficReport, context: Context) -> TrafficReply:  # noqa: N802
        self._relay.publish(request)
        if self._take_speeds is not None:
            self._take_speeds(request)
        if self._live is None:
            seldom_s = SPEEDS_EVERY_S if self._take_speeds is not None else UNREAD_REPORT_EVERY_S
            every_s = REPORT_EVERY_S if self._relay.watched else seldom_s
            return TrafficReply(report_every_s=every_s)
        try:
            reply = TrafficReply(report_every_s=self._live.take_report(request))
            for model, start_s in self._live.on_demand().items():
                reply.on_demand.add(model=model, start_s=start_s)
            return reply
        except SlipstreamError as error:
            await abort(context, error)

    async def WatchTraffic(  # noqa: N802
        self, request: WatchTrafficRequest, context: Context
    ) -> AsyncIterator[TrafficReport]:
        try:
            async with aclosing(self._relay.watch()) as reports:
                async for report in reports:
                    yield report
        except SlipstreamError as error:
            await abort(context, error)

    def close(self) -> None:
        """End all watches, so that the server can stop without cutting them."""
        self._relay.close()

    async def GetPlan(self, request: GetPlanRequest, context: Context) -> Plan:  # noqa: N802
        live = await self._planner(context)
        return plan_message(
            live.objectives,
            live.seen,
            live.history.latest,
            leading=live.leading,
            holder=live.holder,
            dry_run=live.dry_run,
        )

    async def Explain(self, request: ExplainRequest, context: Context) -> PlannerDecision:  # noqa: N802
        live = await self._planner(context)
        try:
            return decision_message(_explained(live.history, request))
        except SlipstreamError as error:
            await abort(context, error)

    async def History(self, request: HistoryRequest, context: Context) -> HistoryReply:  # noqa: N802
        live = await self._planner(context)
        if request.limit > MOST_HISTORY or not math.isfinite(request.since_unix_s):
            limit = f"limit is {request.limit}, at most {MOST_HISTORY}; since_unix_s is {request.since_unix_s:g}"
            await abort(context, InvalidRequestError(limit, param="limit"))
        made = live.history.since(request.since_unix_s, request.limit or HISTORY_LIMIT, acted_only=request.acted_only)
        decisions = [decision_message(one, with_considered=False) for one in made]
        return HistoryReply(decisions=decisions, remembered=len(live.history))

    async def Apply(self, request: ApplyRequest, context: Context) -> ApplyReply:  # noqa: N802
        live = await self._planner(context)
        name = request.name if request.name.isprintable() else ""
        try:
            wanted = parse_policy(request.policy_yaml, name[-MAX_NAME_CHARS:] or "policy")
            changes = policy_changes(live.objectives, wanted)
            live.apply(wanted, dry_run=request.dry_run)
        except ConfigError as error:
            await abort(context, PolicyError(error.message, param=error.param))
        if changes and not request.dry_run:
            log.info("policy_applied", changes={one.setting: f"{one.before} -> {one.after}" for one in changes})
        told = [PolicyChange(setting=one.setting, before=one.before, after=one.after) for one in changes]
        return ApplyReply(changes=told, applied=not request.dry_run)

    async def Simulate(self, request: SimulateRequest, context: Context) -> AsyncIterator[SimulateUpdate]:  # noqa: N802
        asked = _plain(request)
        if not request.policy_yaml:
            asked["policy_yaml"] = dump_policy((await self._planner(context)).objectives)
        async for answer in self._answers("simulate", asked, context):
            if "update" in answer:
                yield SimulateUpdate(progress=ParseDict(answer["update"], SimulateProgress()))
            else:
                result = ParseDict(answer["result"], SimulateResult(), ignore_unknown_fields=True)
                yield SimulateUpdate(result=result)

    async def Recommend(self, request: RecommendRequest, context: Context) -> AsyncIterator[RecommendUpdate]:  # noqa: N802
        async for answer in self._answers("recommend", _plain(request), context):
            if "update" in answer:
                yield RecommendUpdate(tried=ParseDict(answer["update"], PoolFigures()))
            else:
                result = ParseDict(answer["result"], RecommendResult(), ignore_unknown_fields=True)
                yield RecommendUpdate(result=result)

    async def _answers(self, question: str, asked: dict[str, Any], context: Context) -> AsyncIterator[Answer]:
        left_s = context.time_remaining()
        try:
            async with aclosing(
                self._what_if.ask(question, asked, MOST_TIMEOUT_S if left_s is None else left_s)
            ) as answers:
                async for answer in answers:
                    yield answer
        except SlipstreamError as error:
            await abort(context, error)

    async def _planner(self, context: Context) -> LivePlanner:
        if self._live is None:
            await abort(
                context,
                NoPolicyError(
                    "this control plane has no scaling policy; start it with `slipstream planner serve --policy FILE`"
                ),
            )
        return self._live


def _explained(history: History, request: ExplainRequest) -> Made:
    if request.HasField("number"):
        found = history.numbered(request.number)
        which = f"decision {request.number}"
    elif request.HasField("unix_s"):
        if not math.isfinite(request.unix_s):
            raise InvalidRequestError(f"unix_s is {request.unix_s}, it must be a time", param="unix_s")
        found = history.at(request.unix_s)
        which = "a decision so long ago"
    else:
        found = history.latest
        which = "any decision"
    if found is None:
        raise UnknownDecisionError(
            f"the planner does not remember {which}: it has {len(history)}, of {_numbers(history)}",
            code="unknown_decision",
        )
    return found


def _numbers(history: History) -> str:
    latest = history.latest
    return (
        f"numbers {latest.number - len(history) + 1} to {latest.number}" if latest else "which the first is yet to come"
    )


def _plain(request: Message) -> dict[str, Any]:
    """What was set, as the simulator reads it; a load that says nothing is the usual one."""
    return {"load": {}, **MessageToDict(request, preserving_proto_field_name=True)}
