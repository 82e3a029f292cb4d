"""The line of each answered request: what it says, and that the file of them can be replayed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from structlog.testing import capture_logs

from frontend import access_log
from frontend.request_record import RequestRecord
from frontend.tokenizer import TextModel
from simulator.traces import read_access_log
from slipstream import block_keys
from slipstream.errors import StartupError, WorkerLostError
from slipstream.settings import LogSettings
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from slipstream.v1.sampling_pb2 import RequestAccount
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
from tests.support.scripted_worker import until

PROMPT = list(range(5, 45))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "logs" / "access.jsonl"
    with access_log.writing(LogSettings(access_log=path, access_log_blocks=True)):
        yield path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_a_line_says_what_the_request_was_and_how_it_was_answered(
    app_http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, text_model: TextModel, file: Path
) -> None:
    a, b = text_model.encode_now("ab", add_special_tokens=False)
    account = RequestAccount(prompt_tokens=40, decode_computed_tokens=8, fallback="prefill_lost")
    dispatcher.script = lambda request: [tokens(a), tokens(b), last(account=account)]
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9}

    headers = {"X-Request-Id": "mine", "X-Session-Id": "chat-7"}
    response = await app_http.post("/v1/completions", json=body, headers=headers)

    assert response.status_code == 200
    (line,) = lines(file)
    assert line.pop("request_id").startswith("mine-")
    assert line.pop("timestamp") > 1_600_000_000
    assert 0 < line.pop("ttft_s") <= line.pop("total_s")
    assert line.pop("itl_s") >= 0
    assert line == {
        "method": "POST",
        "path": "/v1/completions",
        "status": "200",
        "model": "tiny",
        "session": "chat-7",
        "service_class": "realtime",
        "input_length": 40,
        "cached_length": 32,
        "output_length": 2,
        "fallback": "prefill_lost",
        "block_tokens": 16,
        "block_keys": block_keys.extend(block_keys.root_key("tiny", 16), PROMPT, 16),
    }


async def test_prompts_with_the_same_beginning_have_the_same_first_blocks(
    app_http: httpx.AsyncClient, file: Path
) -> None:
    for prompt in (PROMPT, [*PROMPT[:20], *PROMPT]):
        await app_http.post("/v1/completions", json={"model": "tiny", "prompt": prompt})

    first, second = (line["block_keys"] for line in lines(file))
    assert first[0] == second[0]
    assert first[1] != second[1]


async def test_the_simulator_can_replay_what_was_asked(app_http: httpx.AsyncClient, file: Path) -> None:
    for session in ("one", "two"):
        headers = {"X-Session-Id": session, "X-Slipstream-Class": "batch"}
        await app_http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT}, headers=headers)

    first, second = read_access_log(file)
    assert (first.at_s, first.input_tokens, first.session, first.service_class) == (0.0, 40, "one", "batch")
    assert 0 <= second.at_s < 20
    assert first.keys == second.keys == tuple(block_keys.extend(block_keys.root_key("tiny", 16), PROMPT, 16))


async def test_errors_and_grpc_calls_have_their_line_and_probes_have_none(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher, file: Path
) -> None:
    await http.get("/health/ready")
    await http.get("/metrics")
    await http.post("/v1/chat/completions", json={"model": "tiny"})
    call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
    responses = [response async for response in call]
    # A client has its answer a moment before the line is written.
    await until(lambda: len(lines(file)) == 2)
    assert responses[-1].usage.completion_tokens == lines(file)[-1]["output_length"]
    dispatcher.script = lambda request: [tokens(5), WorkerLostError("gone")]
    await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True})
    await until(lambda: len(lines(file)) == 3)

    said = [(line["method"], line["path"], line["status"], line.get("error")) for line in lines(file)]
    assert said == [
        ("POST", "/v1/chat/completions", "400", "missing_required_parameter"),
        ("rpc", "Generate", "OK", None),
        ("POST", "/v1/completions", "200", "worker_lost"),
    ]


async def test_the_log_has_the_same_line_for_people(app_http: httpx.AsyncClient) -> None:
    with access_log.writing(LogSettings()), capture_logs() as logs:
        await app_http.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2]})

    (said,) = [each for each in logs if each["event"] == "request"]
    assert (said["log_level"], said["path"], said["status"], said["input_length"]) == (
        "info",
        "/v1/completions",
        "200",
        2,
    )
    assert "block_keys" not in said


def test_a_file_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path) -> None:
    with (
        pytest.raises(StartupError, match=r"log\.access_log: .* cannot be written"),
        access_log.writing(LogSettings(access_log=tmp_path)),
    ):
        pytest.fail("it was opened")


def test_a_full_disk_costs_lines_and_nothing_else_and_is_told_once_until_there_is_room(tmp_path: Path) -> None:
    now_s = 0.0
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        writer = access_log.AccessLog(LogSettings(requests=False), full, clock=lambda: now_s)
        with capture_logs() as told:
            for _ in range(3):
                writer.write(a_record(), 0.1)
            path = tmp_path / "access.jsonl"
            with path.open("wb") as room:  # there is room again
                os.dup2(room.fileno(), full)
            writer.write(a_record(), 0.1)
            assert path.read_bytes() == b""
            now_s = 11.0
            writer.write(a_record(), 0.1)
            writer.write(a_record(), 0.1)
    finally:
        os.close(full)
    assert [one["event"] for one in told] == ["access_log_failed", "access_log_regained"]
    assert told[1]["lines_lost"] == 4
    assert len(lines(path)) == 2


def test_a_line_that_was_cut_by_a_full_disk_does_not_spoil_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, really = 0.0, os.write
    path = tmp_path / "access.jsonl"
    with path.open("wb") as file:
        writer = access_log.AccessLog(LogSettings(requests=False), file.fileno(), clock=lambda: now_s)
        monkeypatch.setattr(os, "write", lambda fd, content: really(fd, content[:10]))
        writer.write(a_record(), 0.1)
        monkeypatch.setattr(os, "write", really)
        now_s = 11.0
        writer.write(a_record(), 0.1)
    first, second = path.read_text().splitlines()
    assert len(first) == 10
    assert json.loads(second)["status"] == "200"


def a_record() -> RequestRecord:
    record = RequestRecord("r1", "POST", "/v1/completions", 0.0, time.time_ns())
    record.status = "200"
    return record
