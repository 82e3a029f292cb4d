"""The frontend's part of a trace, as a collector gets it: one span a stage, and the caller's trace gone on with."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc.aio
import httpx
import pytest

from frontend.http_face import create_app
from frontend.inference import InferenceService
from frontend.tokenizer import TextModel
from slipstream import tracing
from slipstream.settings import TracingSettings
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from tests.support.otlp_collector import CollectedSpan, Collector, collecting
from tests.support.scripted_cluster import ScriptedCluster, scripted_cluster
from tests.support.scripted_worker import MODEL, Script

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT}-01"
BODY = {"model": MODEL, "prompt": list(range(5, 45)), "max_tokens": 4}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@asynccontextmanager
async def face(cluster: ScriptedCluster, text_model: TextModel) -> AsyncIterator[httpx.AsyncClient]:
    service = InferenceService(cluster.dispatcher, text_model, model_name=MODEL, request_timeout_s=20, max_n=4)
    app = create_app(service, max_body_bytes=1 << 20)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app", timeout=20) as client:
        yield client


def settings(collector: Collector, *, sample_ratio: float = 1.0) -> TracingSettings:
    return TracingSettings(endpoint=collector.endpoint, sample_ratio=sample_ratio, export_every_s=0.05)


def by_name(spans: list[CollectedSpan]) -> dict[str, CollectedSpan]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


async def test_a_request_is_one_trace_with_a_span_for_each_stage(collector: Collector, text_model: TextModel) -> None:
    with tracing.exporting(settings(collector), service="frontend", instance="f0"):
        async with scripted_cluster() as cluster, face(cluster, text_model) as http:
            response = await http.post("/v1/completions", json=BODY, headers={"traceparent": TRACEPARENT})
            seen = [*cluster.prefills[0].seen.traceparents, *cluster.decodes[0].seen.traceparents]

    assert response.status_code == 200
    spans = by_name(collector.until(7, trace_id=TRACE_ID))
    assert spans.keys() == {"POST completions", "receive", "tokenize", "route", "prefill", "decode", "stream"}
    root = spans["POST completions"]
    assert (root.parent, root.service, root.instance) == (PARENT, "frontend", "f0")
    assert {span.parent for span in spans.values() if span is not root} == {root.span_id}
    assert all(root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in spans.values())
    assert (root.attributes["gen_ai.usage.input_tokens"], root.attributes["gen_ai.usage.output_tokens"]) == (40, 4)
    assert spans["prefill"].attributes["slipstream.worker"] == "p0"
    # Each worker goes on from the call that was made to it.
    assert seen == [f"00-{TRACE_ID}-{spans[name].span_id}-01" for name in ("prefill", "decode")]


async def test_a_second_dispatch_is_in_the_same_trace_and_the_first_one_says_what_failed(
    collector: Collector, text_model: TextModel
) -> None:
    with tracing.exporting(settings(collector), service="frontend", instance="f0"):
        async with (
            scripted_cluster(prefill=0, decode=2, migration_wait_s=0) as cluster,
            face(cluster, text_model) as http,
        ):
            for worker in cluster.decodes:
                worker.script = Script(die_at=1)
            response = await http.post("/v1/completions", json=BODY, headers={"traceparent": TRACEPARENT})

    assert response.status_code == 503
    decodes = [span for span in collector.until(7, trace_id=TRACE_ID) if span.name == "decode"]
    assert sorted(span.attributes["slipstream.worker"] for span in decodes) == ["d0", "d1"]
    assert all(span.failed.startswith("lost:") for span in decodes)
    (root,) = [span for span in collector.spans if span.name == "POST completions"]
    assert root.failed == "worker_lost"


async def test_who_calls_decides_whether_a_request_is_traced(collector: Collector, text_model: TextModel) -> None:
    with tracing.exporting(settings(collector, sample_ratio=0.0), service="frontend", instance="f0"):
        async with scripted_cluster() as cluster, face(cluster, text_model) as http:
            await http.post("/v1/completions", json=BODY)
            await http.post("/v1/completions", json=BODY, headers={"traceparent": TRACEPARENT[:-1] + "0"})
            await http.post("/v1/completions", json=BODY, headers={"traceparent": TRACEPARENT})
            flags = [traceparent[-2:] for traceparent in cluster.decodes[0].seen.traceparents]

    assert {span.trace_id for span in collector.until(7)} == {TRACE_ID}
    assert len(collector.spans) == 7
    # The workers are told, so that they do not begin traces of their own.
    assert flags == ["00", "00", "01"]


async def test_a_grpc_call_goes_on_with_its_callers_trace_too(collector: Collector, channel: grpc.aio.Channel) -> None:
    with tracing.exporting(settings(collector), service="frontend", instance="f0"):
        request = inference_pb2.GenerateRequest(text="x")
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=(("traceparent", TRACEPARENT),))
        assert [response async for response in call][-1].finish_reason
        spans = by_name(await asyncio.to_thread(collector.until, 4, trace_id=TRACE_ID))

    assert spans.keys() == {"rpc generate", "receive", "tokenize", "stream"}
    assert spans["rpc generate"].parent == PARENT


async def test_nothing_is_sent_along_when_nothing_is_traced(text_model: TextModel) -> None:
    async with scripted_cluster() as cluster, face(cluster, text_model) as http:
        await http.post("/v1/completions", json=BODY, headers={"traceparent": TRACEPARENT})

        assert cluster.decodes[0].seen.traceparents == [""]


def test_without_an_endpoint_the_sdk_is_not_even_imported() -> None:
    program = (
        "import sys; from slipstream import tracing; from slipstream.settings import TracingSettings\n"
        "import frontend.process\n"
        "with tracing.exporting(TracingSettings(), service='s', instance='i'):\n"
        "    assert tracing.start('x', {'traceparent': '" + TRACEPARENT + "'}) is tracing.OFF\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert printed.stdout.strip() == "[]"


def test_a_collector_that_is_gone_does_not_hold_up_the_end() -> None:
    gone = TracingSettings(endpoint="http://127.0.0.1:9", export_every_s=60)
    with tracing.exporting(gone, service="s", instance="i"):
        tracing.start("x").end()

    assert not tracing.enabled()
