"""The global frontend's HTTP face before scripted clusters: what goes on, what comes back, what is tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any

import httpx
import pytest

from frontend.clusters import watch
from frontend.clusters.fleet import ClusterFleet
from frontend.clusters.http_face import create_app
from frontend.keys.guard import Guard
from frontend.keys.keyring import Keyring
from frontend.keys.ledger import Ledger
from frontend.keys.secret import new_key
from slipstream.background import background
from slipstream.errors import ConfigError
from slipstream.settings import GlobalFrontendSettings, PeerClusterSettings
from tests.support.scripted_peer import ScriptedPeer, gone, says, streams
from tests.unit.frontend.keys.faces import bearer, content, entry

ANSWER = b'{"id":"cmpl-1","choices":[{"text":"hi"}]}'
BODY = {"model": "sim", "prompt": "hello " * 100, "max_tokens": 3}
FULL = b'{"error":{"code":"queue_overflow"}}'


Global = tuple[httpx.AsyncClient, ClusterFleet]


@asynccontextmanager
async def global_frontend(
    *peers: ScriptedPeer, guard: Guard | None = None, max_body_bytes: int = 4096, **settings: Any
) -> AsyncIterator[Global]:
    """Its client, once all peers have said how they are; they are called c0, c1 and so on."""
    async with AsyncExitStack() as stack:
        for peer in peers:
            await stack.enter_async_context(peer.listening())
        clusters = tuple(
            PeerClusterSettings(name=f"c{place}", http=(peer.url,), key="s3cret") for place, peer in enumerate(peers)
        )
        whole = GlobalFrontendSettings(clusters=clusters, **{"poll_every_s": 0.05, **settings})
        fleet = stack.enter_context(closing(ClusterFleet(whole, "global")))
        await stack.enter_async_context(background(watch.follow(fleet), name="watch"))
        app = create_app(
            fleet, max_body_bytes=max_body_bytes, request_timeout_s=30, draining=lambda: False, guard=guard
        )
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://global")
        for _ in range(1000):
            if all(one.known.heard_s is not None or one.known.failure for one in fleet.members):
                break
            await asyncio.sleep(0.01)
        yield await stack.enter_async_context(client), fleet


async def test_a_request_goes_on_as_it_came_with_what_the_cluster_needs_to_know() -> None:
    peer = ScriptedPeer(says(200, ANSWER, x_slipstream_route="least_time"))
    async with global_frontend(peer) as (client, _):
        headers = {"x-request-id": "mine", "authorization": "Bearer client", "x-slipstream-class": "batch",
                   "traceparent": "00-1-2-01", "x-request-timeout-s": "7",
                   "x-slipstream-peer-key": "forged"}  # fmt: skip
        answer = await client.post("/v1/completions", json=BODY, headers=headers)
    (seen,) = peer.seen
    assert json.loads(seen.body) == BODY
    assert {name: seen.headers[name] for name in ("authorization", "x-slipstream-class", "traceparent")} == {
        "authorization": "Bearer client", "x-slipstream-class": "batch", "traceparent": "00-1-2-01"
    }  # fmt: skip
    assert seen.headers["x-request-id"] == "mine"
    assert seen.headers["x-slipstream-peer-key"] == "s3cret"
    assert 6 < float(seen.headers["x-request-timeout-s"]) <= 7
    assert seen.headers["x-slipstream-prefix"].startswith("601;")
    assert answer.content == ANSWER
    assert answer.headers["x-slipstream-cluster"] == "c0; only_one"
    assert (answer.headers["x-slipstream-route"], answer.headers["x-request-id"]) == ("least_time", "mine")


async def test_events_are_passed_on_byte_for_byte() -> None:
    events = [b"data: {%d}\n\n" % number for number in range(50)] + [b"data: [DONE]\n\n"]
    async with global_frontend(ScriptedPeer(streams(*events))) as (client, _):
        answer = await client.post("/v1/chat/completions", json={"model": "sim", "messages": [], "stream": True})
    assert answer.content == b"".join(events)
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("broken", [gone, says(503, b"{}"), says(500, b"{}")])
async def test_what_fails_before_its_first_byte_is_answered_by_another_cluster(broken: Any) -> None:
    first, second = ScriptedPeer(broken), ScriptedPeer(says(200, ANSWER), wait_s=5.0)
    async with global_frontend(first, second) as (client, _):
        answer = await client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.content) == (200, ANSWER)
    assert answer.headers["x-slipstream-cluster"] == "c1; failover"
    assert first.seen  # a kept connection that ends at once is tried again on a new one


async def test_a_cluster_that_is_gone_costs_no_request_and_is_used_again_when_it_is_back() -> None:
    first, second = ScriptedPeer(says(200, ANSWER)), ScriptedPeer(says(200, ANSWER), wait_s=5.0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(second.listening())
        async with first.listening():
            pass
        clusters = tuple(
            PeerClusterSettings(name=name, http=(peer.url,), key="s3cret")
            for name, peer in (("near", first), ("far", second))
        )
        settings = GlobalFrontendSettings(clusters=clusters, poll_every_s=0.05)
        fleet = stack.enter_context(closing(ClusterFleet(settings, "global")))
        await stack.enter_async_context(background(watch.follow(fleet), name="watch"))
        app = create_app(fleet, max_body_bytes=4096, request_timeout_s=30, draining=lambda: False)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://global")
        await stack.enter_async_context(client)
        await _until_answered_by(client, "far")
        await stack.enter_async_context(first.listening())
        await _until_answered_by(client, "near")


async def _until_answered_by(client: httpx.AsyncClient, cluster: str) -> None:
    async with asyncio.timeout(10):
        while True:
            answer = await client.post("/v1/completions", json=BODY)
            if answer.headers.get("x-slipstream-cluster", "").startswith(cluster):
                assert answer.status_code == 200
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_what_the_client_is_to_blame_for_is_passed_on_and_not_tried_again(status: int) -> None:
    first, second = ScriptedPeer(says(status, b'{"error":{}}')), ScriptedPeer(says(200, ANSWER), wait_s=5.0)
    async with global_frontend(first, second) as (client, _):
        answer = await client.post("/v1/completions", json=BODY)
    assert (answer.status_code, len(second.seen)) == (status, 0)


async def test_a_full_cluster_spills_over_to_another_one() -> None:
    first, second = ScriptedPeer(says(429, FULL, retry_after="9")), ScriptedPeer(says(200, ANSWER), wait_s=5.0)
    async with global_frontend(first, second) as (client, _):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_when_all_are_full_the_shortest_wait_is_told() -> None:
    peers = [ScriptedPeer(says(429, FULL, retry_after=wait)) for wait in ("9", "4", "12")]
    async with global_frontend(*peers) as (client, _):
        answer = await client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
    assert [len(peer.seen) for peer in peers] == [1, 1, 1]


async def test_one_request_is_tried_no_more_often_than_allowed_and_says_what_the_last_cluster_said() -> None:
    peers = [ScriptedPeer(says(503, b'{"error":{"code":"no_worker"}}')) for _ in range(4)]
    async with global_frontend(*peers, max_attempts=2) as (client, _):
        answer = await client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert sum(len(peer.seen) for peer in peers) == 2


async def test_a_cluster_lost_in_the_middle_of_an_answer_is_said_so_in_the_stream() -> None:
    peer = ScriptedPeer(streams(b"data: {}\n\n", then_gone=True))
    async with global_frontend(peer) as (client, _):
        answer = await client.post("/v1/completions", json={**BODY, "stream": True})
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cluster_lost"


async def test_a_refused_key_is_named_and_the_cluster_gets_no_request() -> None:
    peer = ScriptedPeer(says(200, ANSWER), key="another")
    async with global_frontend(peer) as (client, _):
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert "c0/0: the cluster refuses this global frontend's key" in answer.json()["error"]["message"]
        shown = (await client.get("/slipstream/v1/clusters")).json()["clusters"][0]
        assert (shown["health"], shown["why"]) == ("down", "the cluster refuses this global frontend's key")


async def test_a_request_that_is_not_answered_in_time_ends_with_its_deadline() -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)

    async with global_frontend(ScriptedPeer(never)) as (client, fleet):
        answer = await client.post("/v1/completions", json=BODY, headers={"x-request-timeout-s": "0.1"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert [one.known.in_flight for one in fleet.members] == [0]


async def test_a_request_leaves_a_cluster_that_falls_silent_without_a_word() -> None:
    async def falls_silent(writer: asyncio.StreamWriter) -> None:
        first.deaf = True

    first, second = ScriptedPeer(falls_silent), ScriptedPeer(says(200, ANSWER), wait_s=5.0)
    async with global_frontend(first, second, stale_after_s=0.4) as (client, _):
        answer = await client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["x-slipstream-cluster"]) == (200, "c1; failover")


async def test_limits_models_and_unknown_paths_are_answered_without_a_cluster() -> None:
    peer = ScriptedPeer(says(200, ANSWER))
    async with global_frontend(peer) as (client, _):
        assert (await client.post("/v1/completions", content=b"x" * 5000)).status_code == 413
        unknown = await client.post("/v1/completions", json={**BODY, "model": "other"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == ["sim"]
        assert (await client.get("/nothing")).json()["error"]["code"] == "unknown_url"
        assert (await client.get("/v1/completions")).status_code == 405
        assert b"slipstream_global_cluster_up" in (await client.get("/metrics")).content
    assert peer.seen == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"http": ("ftp://x",)},
        {"http": ("http://x:99999",)},
        {"key": None},
        {"key_file": "/nonexistent"},
        {"key": "line\nbreak"},
        {"grpc": ("a:1", "b:2")},
    ],
)
def test_a_wrong_cluster_is_named_at_the_start(wrong: dict[str, Any]) -> None:
    settings = {"name": "eu", "http": ("http://127.0.0.1:1",), "key": "k", **wrong}
    with pytest.raises(ConfigError, match=r"global_frontend\.clusters"):
        ClusterFleet(GlobalFrontendSettings(clusters=(PeerClusterSettings(**settings),)), "global")


async def test_with_keys_it_lets_in_who_has_one_and_the_key_goes_no_further() -> None:
    key, other = new_key(), new_key()
    limits = {"requests_per_minute": 1, "output_tokens_per_minute": 600}
    ring = Keyring(content(entry(key, tenant="acme", models=["sim"], limits=limits), entry(other, models=["big"])))
    peer = ScriptedPeer(says(200, ANSWER, x_ratelimit_remaining_output_tokens="590"))
    async with global_frontend(peer, guard=Guard(ring, Ledger(), counts_tokens=False)) as (client, _):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 401
        assert (await client.get("/slipstream/v1/clusters", headers=bearer(key))).status_code == 403
        assert (await client.post("/v1/completions", json=BODY, headers=bearer(other))).status_code == 403
        forged = bearer(key) | {"x-slipstream-caller": "someone;else", "x-api-key": key.plain}
        answer = await client.post("/v1/completions", json=BODY, headers=forged)
        assert (await client.post("/v1/completions", json=BODY, headers=bearer(key))).status_code == 429
    assert answer.content == ANSWER
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-remaining-output-tokens"] == "590", "the cluster counts those"
    (seen,) = peer.seen
    assert seen.headers["x-slipstream-caller"] == (
        f"{key.key_id};acme;1.0;realtime,nearline,batch;sim;;10.0,600.0;512;{key.key_id}"
    )
    assert key.plain not in str(seen)


async def test_what_a_key_may_not_have_at_one_cluster_is_not_had_at_another() -> None:
    limited = b'{"error":{"code":"rate_limit_exceeded"}}'
    first, second = ScriptedPeer(says(429, limited, retry_after="3")), ScriptedPeer(says(200, ANSWER), wait_s=5.0)
    async with global_frontend(first, second) as (client, _):
        answer = await client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert not second.seen
