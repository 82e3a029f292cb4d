"""The HTTP face where there are keys: who is let in, for what, and what the others are told."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from frontend.admission.claim import Claim, Priority
from frontend.keys.guard import Guard
from frontend.keys.secret import NewKey
from tests.support.scripted_dispatcher import ScriptedDispatcher
from tests.unit.frontend.conftest import Faces
from tests.unit.frontend.keys import faces as keys
from tests.unit.frontend.keys.faces import bearer

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 8}


@pytest.fixture
def guard() -> Guard:
    return keys.usual_guard()


async def ask(http: httpx.AsyncClient, key: NewKey | None = None, **headers: str) -> httpx.Response:
    own = {name.replace("_", "-"): value for name, value in headers.items()}
    return await http.post("/v1/completions", json=BODY, headers=own if key is None else bearer(key) | own)


async def test_a_key_lets_in_and_names_tenant_weight_and_class(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    for headers in (bearer(keys.PLAIN), {"x-api-key": keys.PLAIN.plain}, {"api-key": keys.PLAIN.plain}):
        assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
    assert (await ask(http, keys.BATCH)).status_code == 200
    assert [one.claim for one in dispatcher.requests] == [
        *3 * [Claim(Priority.REALTIME, "acme", 3.0)],
        Claim(Priority.BATCH, "crawler"),
    ]


async def test_another_scheme_does_not_hide_a_key_in_the_other_header(http: httpx.AsyncClient) -> None:
    assert (await ask(http, authorization="Basic Zm9v", x_api_key=keys.PLAIN.plain)).status_code == 200


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, "didn't provide an API key"),
        (keys.STRANGER, "does not know it"),
        (keys.EXPIRED, "has expired"),
        (keys.REVOKED, "was revoked"),
        (keys.EARLY, "is not valid yet"),
    ],
)
async def test_without_a_valid_key_it_is_a_401_in_openais_shape_before_the_body_is_read(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, key: NewKey | None, words: str
) -> None:
    refused = await http.post("/v1/chat/completions", content=b"{broken", headers=bearer(key) if key else {})
    assert refused.status_code == 401
    error = refused.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", None)
    assert words in error["message"]
    assert refused.headers["www-authenticate"] == "Bearer"
    assert dispatcher.requests == []


@pytest.mark.parametrize("wrong", ["", "Bearer", "Bearer é", "Bearer " + "x" * 5000, "Basic YTpi"])
async def test_what_is_no_key_is_refused_like_a_wrong_one(http: httpx.AsyncClient, wrong: str) -> None:
    refused = await http.post("/v1/completions", json=BODY, headers={b"Authorization": wrong.encode("latin-1")})
    assert refused.status_code == 401


async def test_openais_client_tells_the_three_kinds_apart(faces: Faces) -> None:
    for key, kind in (
        (keys.STRANGER, openai.AuthenticationError),
        (keys.OTHER_MODEL, openai.PermissionDeniedError),
    ):
        async with openai.AsyncOpenAI(base_url=f"{faces.http}/v1", api_key=key.plain, max_retries=0) as client:
            with pytest.raises(kind):
                await client.completions.create(model="tiny", prompt="abc")


async def test_a_model_out_of_scope_is_named_and_not_listed(http: httpx.AsyncClient) -> None:
    refused = await ask(http, keys.OTHER_MODEL)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert "'tiny'" in refused.json()["error"]["message"]
    listed = await http.get("/v1/models", headers=bearer(keys.OTHER_MODEL))
    assert listed.json()["data"] == []
    assert (await http.get("/v1/models/tiny", headers=bearer(keys.OTHER_MODEL))).status_code == 403
    assert len((await http.get("/v1/models", headers=bearer(keys.PLAIN))).json()["data"]) == 1


async def test_a_class_out_of_scope_is_refused_and_named(http: httpx.AsyncClient) -> None:
    refused = await ask(http, keys.BATCH, x_slipstream_class="realtime")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "class_not_allowed")
    assert "'realtime'" in refused.json()["error"]["message"]
    tier = await http.post("/v1/completions", json=BODY | {"service_tier": "priority"}, headers=bearer(keys.BATCH))
    assert tier.status_code == 403


@pytest.mark.parametrize(
    ("path", "without", "plain", "observer"),
    [
        ("/health/live", 200, 200, 200),
        ("/health/ready", 200, 200, 200),
        ("/metrics", 401, 403, 200),
        ("/slipstream/v1/requests/nobody", 401, 403, 404),
        ("/v1/models", 401, 200, 403),
        ("/openapi.json", 401, 200, 200),
        ("/nothing/here", 401, 404, 404),
    ],
)
async def test_each_path_has_its_scope(
    http: httpx.AsyncClient, path: str, without: int, plain: int, observer: int
) -> None:
    assert (await http.get(path)).status_code == without
    assert (await http.get(path, headers=bearer(keys.PLAIN))).status_code == plain
    assert (await http.get(path, headers=bearer(keys.OBSERVER))).status_code == observer


async def test_rates_are_told_with_each_answer_and_kept(http: httpx.AsyncClient) -> None:
    first = await ask(http, keys.POOR)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == first.headers["x-ratelimit-limit-output-tokens"] == "60"
    assert first.headers["x-ratelimit-remaining-input-tokens"] < "600"
    assert 29 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
    assert (await ask(http, keys.POOR)).status_code == 200
    refused = await ask(http, keys.POOR)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 28 < int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


async def test_what_was_not_generated_is_not_charged(http: httpx.AsyncClient) -> None:
    whole = await http.post("/v1/completions", json=BODY | {"max_tokens": 60}, headers=bearer(keys.POOR))
    used = whole.json()["usage"]["completion_tokens"]
    models = await http.get("/v1/models", headers=bearer(keys.POOR))
    assert int(models.headers["x-ratelimit-remaining-output-tokens"]) == 60 - used


async def test_a_stream_that_its_client_leaves_gives_its_place_back(
    http: httpx.AsyncClient, guard: Guard, dispatcher: ScriptedDispatcher
) -> None:
    guard.replace(keys.guard_of(keys.entry(keys.PLAIN, limits={"streams": 1})).keyring)
    dispatcher.script = lambda request: [asyncio.Event()]
    left = asyncio.create_task(ask(http, keys.PLAIN))
    await dispatcher.until_running(1)
    assert (await ask(http, keys.PLAIN)).status_code == 429
    left.cancel()
    await dispatcher.until_running(0)
    dispatcher.script = ScriptedDispatcher().script
    assert (await ask(http, keys.PLAIN)).status_code == 200
