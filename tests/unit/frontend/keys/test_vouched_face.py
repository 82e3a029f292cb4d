"""A cluster's faces where a global frontend speaks for its callers."""

from __future__ import annotations

from hashlib import sha256

import grpc.aio
import httpx
import pytest

from frontend.admission.claim import Claim, Priority
from frontend.admission.tenants import Tenants
from frontend.keys.entries import KeyFile
from frontend.keys.guard import Guard
from frontend.keys.keyring import Keyring
from frontend.keys.ledger import Ledger
from slipstream.settings import AdmissionSettings
from slipstream.v1.inference_pb2 import GenerateRequest
from slipstream.v1.inference_pb2_grpc import InferenceStub
from tests.support.scripted_dispatcher import ScriptedDispatcher
from tests.unit.frontend.keys import faces as keys

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 8}
SAID = {
    "x-slipstream-peer-key": "s3cret",
    "x-slipstream-caller": "k3v9x2m8q0ab;acme;3.0;nearline,batch;tiny;;0.5,10.0;512;k3v9x2m8q0ab",
}


@pytest.fixture
def tenants() -> Tenants:
    return Tenants(AdmissionSettings(peer_key_sha256=sha256(b"s3cret").hexdigest()))


@pytest.fixture(params=[True, False], ids=["with keys of its own", "without"])
def guard(request: pytest.FixtureRequest, tenants: Tenants) -> Guard:
    required: bool = request.param
    ring = keys.usual_guard().keyring if required else Keyring(KeyFile())
    return Guard(ring, Ledger(), required=required, check_peer=tenants.check_peer)


async def test_the_caller_is_who_the_global_frontend_says_and_has_its_rates_of_tokens(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    first = await http.post("/v1/completions", json=BODY, headers=SAID)
    assert first.status_code == 200
    assert dispatcher.requests[0].claim == Claim(Priority.NEARLINE, "acme", 3.0)
    used = first.json()["usage"]["completion_tokens"]
    assert used > 2
    refused = await http.post("/v1/completions", json=BODY, headers=SAID)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    other_model = SAID | {"x-slipstream-caller": SAID["x-slipstream-caller"].replace(";tiny;", ";other;")}
    assert (await http.post("/v1/completions", json=BODY, headers=other_model)).status_code == 403


async def test_over_grpc_too(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    call = InferenceStub(channel).Generate(GenerateRequest(text="abc"), metadata=tuple(SAID.items()), timeout=20)
    assert [one async for one in call]
    assert dispatcher.requests[0].claim.tenant == "acme"


async def test_nobody_else_is_believed(http: httpx.AsyncClient, guard: Guard) -> None:
    forged = SAID | {"x-slipstream-peer-key": "guessed"}
    assert (await http.post("/v1/completions", json=BODY, headers=forged)).status_code == 401
    alone = {"x-slipstream-caller": SAID["x-slipstream-caller"]}
    open_to_all = guard._required is False
    assert (await http.post("/v1/completions", json=BODY, headers=alone)).status_code == (200 if open_to_all else 401)
