"""Tells the planner, each second or so, what came to this frontend and what became of it.

Reports are soft: one that does not arrive is not sent again, and a planner that is gone costs one failed call a second
and nothing else. Where nobody plans, the control plane asks to hear of it seldom.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import grpc.aio
from prometheus_client import Counter

from frontend.traffic_count import TRAFFIC, Counted, Queued, TrafficCount
from slipstream import telemetry
from slipstream.grpc_channels import client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.planner_pb2 import TrafficReport, WorkerSpeed
from slipstream.v1.planner_pb2_grpc import PlannerStub

log = telemetry.get_logger(__name__)

FIRST_REPORT_EVERY_S = 1.0
LEAST_EVERY_S = 0.2
MOST_EVERY_S = 60.0
CALL_TIMEOUT_S = 1.0
RECONNECT_BACKOFF_S = 1.0

REPORTS = Counter(
    "slipstream_frontend_traffic_reports",
    "Reports of traffic to the planner, by result: sent or lost. Lost ones for long: the planner decides without "
    "knowing what comes here; is control_plane.address right, and the control plane up?",
    ("result",),
)
for _result in ("sent", "lost"):
    REPORTS.labels(_result)

Queues = Callable[[], Mapping[tuple[str, str], Queued]]
"""What waits in this frontend now, by model and class."""


class TrafficReporter:
    """Reports while `follow` runs.

    Args:
        address: host:port of the control plane.
        speeds: what is new of the workers' speed.
        take_on_demand: told the models that the planner starts from zero, and the seconds which that takes.
    """

    def __init__(
        self,
        address: str,
        queues: Queues,
        *,
        speeds: Callable[[], Iterable[WorkerSpeed]] = tuple,
        counted: TrafficCount = TRAFFIC,
        clock: Callable[[], float] = time.monotonic,
        take_on_demand: Callable[[Mapping[str, float]], None] = lambda start_s: None,
    ) -> None:
        self._take_on_demand = take_on_demand
        self._address = address
        self._queues = queues
        self._speeds = speeds
        self._counted = counted
        self._clock = clock
        self._frontend_id = uuid.uuid4().hex
        self._sequence = 0
        self._since_s = clock()
        self._lost = False

    async def follow(self) -> NoReturn:
        """Report again and again, whatever happens to the planner. Runs until cancelled."""
        every_s = FIRST_REPORT_EVERY_S
        options = client_options(max_reconnect_backoff_s=RECONNECT_BACKOFF_S)
        async with open_channel(self._address, peer=ComponentRole.CONTROL_PLANE, options=options) as channel:
            stub = PlannerStub(channel)
            while True:
                # Several frontends shall not all report at the same moment.
                await asyncio.sleep(every_s * random.uniform(0.9, 1.1))
                try:
                    reply = await stub.ReportTraffic(self.next_report(), timeout=CALL_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    self._note_lost(from_rpc_error(error).message)
                    every_s = FIRST_REPORT_EVERY_S
                    continue
                self._note_sent()
                self._take_on_demand({one.model: one.start_s for one in reply.on_demand})
                every_s = min(max(reply.report_every_s, LEAST_EVERY_S), MOST_EVERY_S)

    def next_report(self) -> TrafficReport:
        """All that was counted since the last one."""
        now_s, parts, queued = self._clock(), self._counted.take(), self._queues()
        self._sequence += 1
        report = TrafficReport(
            frontend_id=self._frontend_id, sequence=self._sequence, interval_s=max(0.0, now_s - self._since_s)
        )
        report.speeds.extend(self._speeds())
        self._since_s = now_s
        for name in sorted(parts.keys() | queued.keys()):
            part = parts.get(name, Counted()).to_wire(*name)
            waiting = queued.get(name)
            if waiting is not None:
                part.queued, part.queued_tokens = waiting.requests, waiting.prompt_tokens
                part.oldest_wait_s = waiting.oldest_wait_s
            report.parts.append(part)
        return report

    def _note_sent(self) -> None:
        REPORTS.labels("sent").inc()
        if self._lost:
            log.info("traffic_reports_resumed", planner=self._address)
        self._lost = False

    def _note_lost(self, reason: str) -> None:
        REPORTS.labels("lost").inc()
        if not self._lost:
            log.warning("traffic_reports_lost", planner=self._address, reason=reason)
        self._lost = True
