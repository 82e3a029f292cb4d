"""Why a request went where it went: the header, the endpoint and the command, through a whole frontend."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from frontend.decisions import Decisions
from frontend.router import Ask, Route
from slipstream.cli.app import app
from slipstream.v1.registry_pb2 import WorkerRecord
from tests.support.scripted_cluster import scripted_cluster
from tests.support.scripted_frontend import listening_frontend
from tests.support.scripted_worker import MODEL

BODY = {"model": MODEL, "prompt": "one two three four", "max_tokens": 12, "temperature": 0}


async def ask(url: str, request_id: str, **more: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        answer = await client.post("/v1/completions", json=BODY | more, headers={"x-request-id": request_id})
        assert answer.status_code == 200
        return answer


async def explained(url: str, request_id: str, *flags: str) -> str:
    arguments = ["explain", request_id, "--frontend", url, *flags]
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_in_a_word_why_and_the_command_says_the_rest(tmp_path: Path, stream: bool) -> None:
    async with scripted_cluster(prefill=2) as cluster, listening_frontend(cluster, tmp_path) as url:
        answer = await ask(url, "mine", stream=stream)
        assert answer.headers["x-slipstream-route"] == "least_time"
        # In one process with the frontend, whose log is on the same output.
        (decision,) = json.loads((await explained(url, "mine", "--json")).splitlines()[-1])
        shown = await explained(url, "mine")
    workers = decision["prefill_worker"], decision["decode_worker"]
    assert workers[0] in ("p0", "p1")
    assert (workers[1], decision["reason"], decision["policy"]) == ("d0", "least_time", "kv")
    best, *others = decision["considered"]
    assert (best["prefill_worker"], best["decode_worker"]) == workers
    assert all(other["cost_s"] >= best["cost_s"] * 0.99 for other in others if other["prefill_worker"])
    assert decision["actual"]["tokens"] == 12
    assert 0 < decision["actual"]["prefill_s"] <= decision["actual"]["ttft_s"]
    for fact in (*workers, "because: least_time", "first token", "predicted", "12 tokens generated"):
        assert fact in shown


async def test_a_request_nobody_made_is_not_explained(tmp_path: Path) -> None:
    async with scripted_cluster() as cluster, listening_frontend(cluster, tmp_path) as url:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["explain", "nobody", "--frontend", url])
        assert result.exit_code == 1
        assert "does not know request nobody" in result.stderr
    result = await asyncio.to_thread(CliRunner().invoke, app, ["explain", "nobody", "--frontend", url])
    assert "does not answer" in result.stderr


@pytest.mark.parametrize("by", ["header", "user"])
async def test_a_session_stays_with_its_workers(tmp_path: Path, by: str) -> None:
    async with (
        scripted_cluster(prefill=4, decode=4, policy="session") as cluster,
        listening_frontend(cluster, tmp_path) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        used = dict[str, set[str]]()
        for session in ("anna", "berta", "carla", "dora"):
            headers = {"x-session-id": session} if by == "header" else {}
            body = BODY | ({"user": session} if by == "user" else {})
            for turn in range(3):
                prompt = f"{session} {turn}"
                answer = await client.post("/v1/completions", json=body | {"prompt": prompt}, headers=headers)
                assert answer.headers["x-slipstream-route"] == "session"
                used.setdefault(session, set()).add(answer.headers["x-slipstream-decode-worker"])
        assert all(len(workers) == 1 for workers in used.values())
        assert len(set.union(*used.values())) > 1


def test_only_the_last_requests_are_remembered_each_with_all_its_dispatches() -> None:
    decisions = Decisions(kept=3)
    route = Route(WorkerRecord(worker_id="d"), None, "least_load")
    for index in range(5):
        decisions.record(f"r{index}", Ask("m", 9), route, "load", 1.0)
        decisions.record(f"r{index}", Ask("m", 9), route, "load", 2.0)
    assert len(decisions) == 3
    assert decisions.of("r1") == []
    assert [one.attempt for one in decisions.of("r4")] == [1, 2]
    decisions.record("mine-1a2b3c4d-0", Ask("m", 9), route, "load", 1.0)
    decisions.record("mine-1a2b3c4d-1", Ask("m", 9), route, "load", 1.0)
    assert len(decisions.of("mine")) == 2, "by the id that the client gave"
