"""Every sampling field a client may send reaches the workers as it was meant."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from frontend.tokenizer import TextModel
from slipstream.v1.sampling_pb2 import SamplingParams
from tests.support.scripted_dispatcher import ScriptedDispatcher

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
COMPLETION = ("/v1/completions", {"prompt": "hi"})
BOTH = pytest.mark.parametrize("endpoint", [CHAT, COMPLETION], ids=["chat", "completions"])


@pytest.fixture
def http(app_http: httpx.AsyncClient) -> httpx.AsyncClient:
    return app_http


async def sampling_of(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, endpoint: tuple[str, dict[str, Any]], **fields: Any
) -> SamplingParams:
    path, body = endpoint
    response = await http.post(path, json={"model": "tiny"} | body | fields)
    assert response.status_code == 200, response.text
    return dispatcher.requests[-1].sampling


@BOTH
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 5),
        ("min_tokens", 2),
        ("temperature", 0),
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("top_k", 40),
        ("top_k", -1),
        ("min_p", 0.05),
        ("seed", -(2**63)),
        ("presence_penalty", -1.5),
        ("frequency_penalty", 2),
        ("repetition_penalty", 1.1),
        ("ignore_eos", True),
    ],
)
async def test_a_number_or_flag_reaches_the_workers(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, endpoint: Any, field: str, value: Any
) -> None:
    sampling = await sampling_of(http, dispatcher, endpoint, **{field: value})
    assert getattr(sampling, field) == value


@BOTH
async def test_absent_and_null_fields_stay_absent(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, text_model: TextModel, endpoint: Any
) -> None:
    nulls = dict.fromkeys(
        ("temperature", "top_p", "top_k", "seed", "stop", "logit_bias", "n", "stream", "user", "stop")
    )
    sampling = await sampling_of(http, dispatcher, endpoint, **nulls)
    expected = SamplingParams(max_tokens=sampling.max_tokens, stop_token_ids=sorted(text_model.eos_token_ids))
    assert sampling == expected


@BOTH
async def test_logit_bias_and_stop_token_ids_reach_the_workers(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, text_model: TextModel, endpoint: Any
) -> None:
    fields: dict[str, Any] = {"logit_bias": {"5": -100, "6": 0.5}, "stop_token_ids": [9]}
    sampling = await sampling_of(http, dispatcher, endpoint, **fields)
    assert dict(sampling.logit_bias) == {5: -100, 6: 0.5}
    assert set(sampling.stop_token_ids) == {9} | text_model.eos_token_ids


async def test_ignore_eos_leaves_only_the_clients_stop_tokens(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    sampling = await sampling_of(http, dispatcher, CHAT, ignore_eos=True, stop_token_ids=[9])
    assert list(sampling.stop_token_ids) == [9]


async def test_max_tokens_defaults_to_the_rest_of_the_context_for_chat_and_sixteen_for_completions(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    chat = await sampling_of(http, dispatcher, CHAT)
    assert chat.max_tokens + len(dispatcher.requests[-1].token_ids) == 256
    completion = await sampling_of(http, dispatcher, COMPLETION)
    assert completion.max_tokens == 16
    crowded = await sampling_of(http, dispatcher, COMPLETION, prompt=[1] * 250)
    assert crowded.max_tokens == 6


async def test_the_models_recommendations_fill_in_what_a_request_leaves_open(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_model, "sampling_defaults", {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1})
    silent = await sampling_of(http, dispatcher, CHAT)
    assert (silent.temperature, silent.top_k, silent.repetition_penalty) == (0.6, 20, 1.1)
    explicit = await sampling_of(http, dispatcher, CHAT, temperature=0, top_k=-1)
    assert (explicit.temperature, explicit.top_k) == (0, -1)
    assert not silent.HasField("top_p")


async def test_max_completion_tokens_is_the_newer_name_and_wins(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    sampling = await sampling_of(http, dispatcher, CHAT, max_completion_tokens=3, max_tokens=9)
    assert sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("endpoint", "fields", "expected"),
    [
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20),
        (CHAT, {"logprobs": False}, None),
        (COMPLETION, {"logprobs": 0}, 0),
        (COMPLETION, {"logprobs": 5}, 5),
        (COMPLETION, {}, None),
    ],
)
async def test_logprobs_mean_a_number_of_alternatives(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, endpoint: Any, fields: Any, expected: int | None
) -> None:
    sampling = await sampling_of(http, dispatcher, endpoint, **fields)
    assert (sampling.logprobs if sampling.HasField("logprobs") else None) == expected


async def test_seeds_wrap_around_rather_than_overflow(http: httpx.AsyncClient, dispatcher: ScriptedDispatcher) -> None:
    await sampling_of(http, dispatcher, CHAT, seed=2**63 - 1, n=2)
    assert sorted(request.sampling.seed for request in dispatcher.requests) == [-(2**63), 2**63 - 1]


@BOTH
async def test_unknown_fields_are_let_be(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, endpoint: Any
) -> None:
    harmless: dict[str, Any] = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "zzz": [1]}
    await sampling_of(http, dispatcher, endpoint, **harmless)


async def test_empty_tools_and_text_formats_are_no_reason_to_refuse(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    fields: dict[str, Any] = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    await sampling_of(http, dispatcher, CHAT, **fields, modalities=["text"], parallel_tool_calls=True)
    await sampling_of(http, dispatcher, COMPLETION, echo=False, best_of=1, suffix="")
