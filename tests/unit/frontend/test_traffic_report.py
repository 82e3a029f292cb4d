"""What a frontend tells the planner: each request once, from its arrival to its end. No request waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import httpx
import pytest
from prometheus_client import REGISTRY

from frontend import traffic_report
from frontend.admission.gate import AdmissionGate
from frontend.admission.in_flight import ClusterRoom
from frontend.traffic_count import TRAFFIC, Queued, TrafficCount
from frontend.traffic_report import TrafficReporter
from planner.planner_service import PlannerService
from slipstream.background import background
from slipstream.errors import UnavailableError
from slipstream.settings import AdmissionSettings
from slipstream.v1.planner_pb2 import TrafficPart, TrafficReply, TrafficReport
from slipstream.v1.planner_pb2_grpc import add_PlannerServicer_to_server
from slipstream.v1.sampling_pb2 import RequestAccount
from tests.support.scripted_cluster import a_request
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
from tests.support.scripted_worker import until
from tests.unit.frontend.conftest import Faces


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    TRAFFIC.take()
    yield
    TRAFFIC.take()


def told(queues: Callable[[], dict[tuple[str, str], Queued]] = dict) -> dict[tuple[str, str], TrafficPart]:
    """What would be reported now."""
    report = TrafficReporter("nobody:1", queues).next_report()
    return {(part.model, part.service_class): part for part in report.parts}


async def post(faces: Faces, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.post(
            f"{faces.http}/v1/completions", json={"model": "tiny", "prompt": [1, 2, 3, 4, 5], "max_tokens": 9} | body
        )


async def test_an_answered_request_is_counted_with_its_tokens_and_latencies(
    faces: Faces, dispatcher: ScriptedDispatcher
) -> None:
    account = RequestAccount(prompt_tokens=5, prefill_computed_tokens=2, decode_computed_tokens=1)
    dispatcher.script = lambda request: [tokens(7), tokens(8, 9), last(7, account=account)]
    assert (await post(faces)).status_code == 200
    await until(lambda: bool(TRAFFIC._parts))
    part = told()["tiny", "realtime"]
    assert (part.finished, part.output_tokens, part.failed, part.refused) == (1, 4, 0, 0)
    assert (part.computed_prompt_tokens, part.cached_tokens) == (2, 3)
    assert (list(part.ttft.counts), list(part.itl.counts)) == ([1], [1])
    assert told() == {}, "each is told once"


async def test_several_answers_to_one_request_are_as_many_and_classes_are_apart(
    faces: Faces, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [tokens(7), last(8)]
    await post(faces, n=3)
    async with httpx.AsyncClient(timeout=10) as client:
        body = {"model": "tiny", "prompt": [1], "max_tokens": 2}
        await client.post(f"{faces.http}/v1/completions", json=body, headers={"x-slipstream-class": "batch"})
    await until(lambda: len(TRAFFIC._parts) == 2)
    parts = told()
    assert (parts["tiny", "realtime"].finished, parts["tiny", "realtime"].output_tokens) == (3, 6)
    assert (parts["tiny", "batch"].finished, parts["tiny", "batch"].output_tokens) == (1, 2)
    assert list(parts["tiny", "realtime"].itl.counts) == [], "the time between tokens of several answers is none"


async def test_what_the_service_could_not_answer_failed_and_a_wrong_request_is_no_traffic(
    faces: Faces, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [UnavailableError("no")]
    assert (await post(faces)).status_code == 503
    dispatcher.script = lambda request: [tokens(7), UnavailableError("no")]
    await post(faces, stream=True)
    assert (await post(faces, temperature=-1)).status_code == 400
    await until(lambda: TRAFFIC.of("tiny", "realtime").failed == 2)
    part = told()["tiny", "realtime"]
    assert (part.finished, part.failed, part.refused, part.output_tokens) == (0, 2, 0, 0)


async def test_a_request_for_which_there_is_no_worker_is_refused(faces: Faces, dispatcher: ScriptedDispatcher) -> None:
    dispatcher.served = []
    assert (await post(faces)).status_code == 503
    await until(lambda: bool(TRAFFIC._parts))
    assert told()["tiny", "realtime"].refused == 1


async def test_arrivals_are_counted_at_the_gate_and_what_waits_there_is_told() -> None:
    first_token = asyncio.Event()
    inner = ScriptedDispatcher(lambda request: [first_token, tokens(1), last(2)])
    room = ClusterRoom(prefill_workers=1, decode_workers=1, places=1, kv_tokens=1 << 30)
    gate = AdmissionGate(inner, AdmissionSettings(realtime_queue=1), request_timeout_s=10, room=lambda: room)

    async def ask(number: int) -> int:
        return len([delta async for delta in gate.generate(a_request(f"r{number}"))])

    asked = [asyncio.create_task(ask(number)) for number in range(3)]
    await until(lambda: any(one.done() for one in asked))
    (part,) = told(gate.queued).values()
    prompt = len(a_request("r").token_ids)
    assert (part.arrivals, part.refused, part.input_tokens) == (2, 1, 2 * prompt)
    assert (part.queued, part.queued_tokens) == (1, prompt)
    assert 0 < part.oldest_wait_s < 10
    first_token.set()
    assert sorted(str(one) for one in await asyncio.gather(*asked, return_exceptions=True))[:2] == ["2", "2"]
    assert gate.queued() == {}


class ListeningPlanner(PlannerService):
    def __init__(self, every_s: float) -> None:
        super().__init__(None)
        self.every_s = every_s
        self.reports: list[TrafficReport] = []

    async def ReportTraffic(self, request: TrafficReport, context: Any) -> TrafficReply:  # noqa: N802
        self.reports.append(request)
        return TrafficReply(report_every_s=self.every_s)


@asynccontextmanager
async def listening(planner: ListeningPlanner, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    add_PlannerServicer_to_server(planner, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


def reports(result: str) -> float:
    return REGISTRY.get_sample_value("slipstream_frontend_traffic_reports_total", {"result": result}) or 0.0


async def test_reports_go_on_through_a_planner_that_is_gone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_report, "FIRST_REPORT_EVERY_S", 0.02)
    monkeypatch.setattr(traffic_report, "LEAST_EVERY_S", 0.01)
    monkeypatch.setattr(traffic_report, "RECONNECT_BACKOFF_S", 0.1)
    counted, planner = TrafficCount(), ListeningPlanner(0.02)
    sent, lost = reports("sent"), reports("lost")
    async with listening(planner) as port:
        reporter = TrafficReporter(f"127.0.0.1:{port}", dict, counted=counted)
        following = background(reporter.follow(), name="reports")
        task = await following.__aenter__()
        counted.arrived("m", "batch", 7)
        await until(lambda: any(one.parts for one in planner.reports) and len(planner.reports) > 2)
    await until(lambda: reports("lost") > lost)
    heard = len(planner.reports)
    async with listening(planner, port):
        counted.arrived("m", "batch", 5)
        await until(lambda: len(planner.reports) > heard + 1)
        await following.__aexit__(None, None, None)
    assert task.cancelled()
    sequences = [one.sequence for one in planner.reports]
    assert sequences == sorted(set(sequences)), "no report comes twice, none is taken back"
    assert len({one.frontend_id for one in planner.reports}) == 1
    assert reports("sent") - sent >= heard
    assert sum(part.arrivals for one in planner.reports[:heard] for part in one.parts) == 1
