"""Why a request went where it went: the header, the endpoint and the command, through a whole frontend."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from frontend.admission.accounts import AdmissionAccounts
from frontend.admission.claim import Claim, Priority
from frontend.decisions import Decisions
from frontend.router import Ask, Route
from slipstream.cli.app import app
from slipstream.cli.explain import admission_line
from slipstream.client import AsyncClient
from slipstream.errors import QueueFullError
from slipstream.v1.registry_pb2 import WorkerRecord
from tests.support.scripted_cluster import scripted_cluster
from tests.support.scripted_frontend import listening_faces, listening_frontend
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
        (decision,) = json.loads((await explained(url, "mine", "--json")).splitlines()[-1])["dispatches"]
        shown = await explained(url, "mine")
    workers = decision["prefill_worker"], decision["decode_worker"]
    assert workers[0] in ("p0", "p1")
    assert (workers[1], decision["reason"], decision["policy"]) == ("d0", "least_time", "kv")
    best, *others = decision["considered"]
    assert (best["prefill_worker"], best["decode_worker"]) == workers
    assert all(other["cost_s"] >= best["cost_s"] * 0.99 for other in others if other["prefill_worker"])
    assert decision["actual"]["tokens"] == 12
    # Scripted workers do not wait for each other: the first token may come before the prompt is said to be computed.
    assert decision["actual"]["prefill_s"] > 0
    assert decision["actual"]["ttft_s"] > 0
    for fact in (*workers, "because: least_time", "first token", "predicted", "12 tokens generated"):
        assert fact in shown


async def test_an_answer_over_grpc_says_it_too_and_can_be_asked_for(tmp_path: Path) -> None:
    async with scripted_cluster() as cluster, listening_faces(cluster, tmp_path) as (url, grpc_address):
        async with AsyncClient(grpc_address, timeout_s=20) as client:
            answer = await client.complete("one two three four", max_tokens=12, request_id="mine")
        assert answer.route == "least_time"
        (decision,) = json.loads((await explained(url, "mine", "--json")).splitlines()[-1])["dispatches"]
        assert decision["reason"] == answer.route


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


def test_a_flood_of_refusals_does_not_drive_out_what_was_let_in() -> None:
    accounts = AdmissionAccounts(kept=3)
    accounts.open("mine", Claim(tenant="calm"), 1.0).admitted(0.5, 1.5)
    for index in range(9):
        refused = accounts.open(f"r{index}", Claim(), 2.0)
        refused.refused(QueueFullError("full", retry_after_s=7.2), 0.0, 2.0)
        accounts.refused(refused)
    assert [one.waited_s for one in accounts.of("mine")] == [0.5]
    assert accounts.of("r1") == []
    assert [one.retry_after_s for one in accounts.of("r8")] == [7.2]


def test_how_a_request_came_to_the_workers_or_not_is_said_in_words() -> None:
    accounts = AdmissionAccounts()
    batch = accounts.open("b", Claim(Priority.BATCH, "acme"), 10.0)
    assert admission_line(batch, 12.5).endswith("admission: batch, tenant acme; waiting for 2500.0 ms now")
    batch.admitted(3.0, 13.0)
    batch.preempted(14.0)
    batch.admitted(1.0, 15.0)
    assert admission_line(batch, 20.0).endswith("sent after 4000.0 ms in the queue, taken from the workers again once")
    refused = accounts.open("r", Claim(), 10.0)
    refused.refused(QueueFullError("full", retry_after_s=7.2), 0.0, 10.0)
    assert admission_line(refused, 11.0).endswith(
        "tenant default; refused (queue_overflow) without a wait, to come again after 8 s"
    )


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
    decisions.record("mine-1a2b3c4d-1-1", Ask("m", 9), route, "load", 1.0)
    assert len(decisions.of("mine")) == 3, "by the id that the client gave"
    assert len(decisions.of("mine-1a2b3c4d-1")) == 2, "also what was sent again after a pause"
