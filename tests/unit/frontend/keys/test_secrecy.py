"""A key is nowhere in what a frontend writes, whatever becomes of the requests that come with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import httpx
import pytest
import structlog

from frontend import access_log
from frontend.keys.guard import Guard
from frontend.keys.secret import NewKey
from slipstream import telemetry, tracing
from slipstream.settings import LogSettings, TracingSettings
from slipstream.v1.inference_pb2 import GenerateRequest
from slipstream.v1.inference_pb2_grpc import InferenceStub
from tests.support.otlp_collector import Collector, collecting
from tests.support.scripted_dispatcher import ScriptedDispatcher
from tests.unit.frontend.keys import faces as keys

ALL = (keys.PLAIN, keys.OBSERVER, keys.OTHER_MODEL, keys.REVOKED, keys.EXPIRED, keys.POOR, keys.STRANGER)
BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 8}


@pytest.fixture
def guard() -> Guard:
    return keys.usual_guard()


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """The access log; all other logs, down to debug, go to standard error, as in a process of its own."""
    before, configured = logging.getLogger().handlers[:], structlog.get_config()
    settings = LogSettings(level="debug", format="json", access_log=tmp_path / "access.jsonl")
    telemetry.configure(settings, component="frontend")
    with access_log.writing(settings):
        yield (tmp_path / "access.jsonl").read_text
    logging.getLogger().handlers[:] = before
    logging.getLogger().setLevel(logging.WARNING)
    telemetry._lines = None
    structlog.configure(**configured)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        settings = TracingSettings(endpoint=collector.endpoint, export_every_s=0.05)
        with tracing.exporting(settings, service="frontend", instance="f0"):
            yield collector


async def test_no_key_is_written_anywhere(
    written: Callable[[], str],
    collector: Collector,
    http: httpx.AsyncClient,
    channel: grpc.aio.Channel,
    dispatcher: ScriptedDispatcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = ""
    for key in ALL:
        said += await asked_in_every_way(http, channel, key)
    dispatcher.script = lambda request: [ZeroDivisionError("a bug")]  # with a traceback in the log
    said += await asked_in_every_way(http, channel, keys.PLAIN)
    said += (await http.get("/metrics", headers=keys.bearer(keys.OBSERVER))).text
    tracing_spans = str(collector.spans)
    out, err = capsys.readouterr()
    everything = said + out + err + written() + tracing_spans
    assert "Traceback" in err
    assert f'"key":"{keys.PLAIN.key_id}"' in written(), "the access log has the key's id"
    assert '"tenant":"acme"' in written()
    assert "request_failed" in err
    for key in ALL:
        secret = key.plain.rpartition("_")[2]
        assert secret not in everything
        assert secret[:16] not in everything, "nor a part of it"
        assert key.sha256 not in everything


async def asked_in_every_way(http: httpx.AsyncClient, channel: grpc.aio.Channel, key: NewKey) -> str:
    """All that was answered."""
    said = []
    for headers in (keys.bearer(key), {"x-api-key": key.plain}, {"authorization": key.plain}):
        for body in (BODY, BODY | {"stream": True}, BODY | {"model": "other"}, {"prompt": 3}):
            answer = await http.post("/v1/completions", json=body, headers=headers)
            said.append(f"{answer.headers}{answer.text}")
        for path in ("/v1/models", "/slipstream/v1/requests/x", "/nothing"):
            looked = await http.get(path, headers=headers)
            said.append(f"{looked.headers}{looked.text}")
    try:
        metadata = (("authorization", f"Bearer {key.plain}"),)
        call = InferenceStub(channel).Generate(GenerateRequest(text="abc"), metadata=metadata, timeout=20)
        said += [str(one) async for one in call]
    except grpc.aio.AioRpcError as error:
        said.append(f"{error.details()}{error.trailing_metadata()}")
    return "".join(said)
