"""Answers of the OpenAI-compatible face, as the official client sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest

from frontend.generation import TokenDelta, TokenRequest
from frontend.tokenizer import TextModel
from slipstream.errors import MigrationLimitError, NoWorkerError, WorkerLostError
from slipstream.v1.sampling_pb2 import Candidate, FinishReason, RequestAccount, TokenLogprobs
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens

LENGTH = FinishReason.FINISH_REASON_LENGTH
QUESTION: Any = [{"role": "user", "content": "Say hello."}]


async def chat(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(model="tiny", messages=QUESTION, **fields)


async def complete(client: openai.AsyncOpenAI, prompt: Any = "Say", **fields: Any) -> Any:
    return await client.completions.create(model="tiny", prompt=prompt, **fields)


async def test_a_chat_is_answered_without_the_end_of_sequence_token(client: openai.AsyncOpenAI) -> None:
    answer = await chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)


async def test_usage_counts_every_generated_token_and_the_rendered_prompt(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    usage = (await chat(client)).usage
    [request] = dispatcher.requests
    assert usage.prompt_tokens == len(request.token_ids)
    assert usage.completion_tokens == len(dispatcher.script(request))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_a_chat_is_rendered_with_the_models_template_and_no_second_bos(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    await chat(client)
    expected = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    assert dispatcher.requests[0].token_ids == text_model.encode_now(expected, add_special_tokens=False)


async def test_content_may_be_text_parts_and_developer_means_system(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hi", "name": "ann"},
    ]
    await client.chat.completions.create(model="tiny", messages=parts)
    expected = "<|im_start|>system\nBe\nbrief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert dispatcher.requests[0].token_ids == text_model.encode_now(expected, add_special_tokens=False)


@pytest.mark.parametrize("form", ["text", "texts", "ids", "batch"])
async def test_completion_prompts_come_in_four_forms(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel, form: str
) -> None:
    say = text_model.encode_now("Say", add_special_tokens=True)
    forms: dict[str, Any] = {"text": "Say", "texts": ["Say", "Say"], "ids": say, "batch": [say, say]}
    answer = await complete(client, forms[form])
    count = 2 if form in ("texts", "batch") else 1
    assert [choice.text for choice in answer.choices] == ["hello world"] * count
    assert [choice.index for choice in answer.choices] == list(range(count))
    assert all(list(request.token_ids) == say for request in dispatcher.requests)
    assert answer.usage.prompt_tokens == count * len(say)
    assert answer.object == "text_completion"


async def test_a_streamed_chat_joins_to_the_same_text(client: openai.AsyncOpenAI) -> None:
    chunks = [chunk async for chunk in await chat(client, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1].choices[0].delta.content is None
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_include_usage_adds_a_last_chunk_without_choices(client: openai.AsyncOpenAI) -> None:
    for create in (chat, complete):
        stream = await create(client, stream=True, stream_options={"include_usage": True})
        *chunks, usage_chunk = [chunk async for chunk in stream]
        whole = await create(client)
        assert usage_chunk.choices == []
        assert usage_chunk.usage == whole.usage
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_n_answers_are_requests_of_their_own_with_following_seeds(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    words = [text_model.encode_now(word, add_special_tokens=False) for word in ("one", "two", "three")]
    dispatcher.script = lambda request: [last(*words[request.sampling.seed - 7], reason=LENGTH)]
    answer = await chat(client, n=3, seed=7)
    assert [choice.message.content for choice in answer.choices] == ["one", "two", "three"]
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    ids = sorted(request.request_id for request in dispatcher.requests)
    assert [request_id.rsplit("-", 1)[1] for request_id in ids] == ["0", "1", "2"]
    assert answer.usage.prompt_tokens == len(dispatcher.requests[0].token_ids)
    assert answer.usage.completion_tokens == sum(map(len, words))

    stream = await chat(client, n=3, seed=7, stream=True)
    texts = ["", "", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["one", "two", "three"]


async def test_one_failing_answer_of_n_ends_the_others(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    def script(request: TokenRequest) -> list[Any]:
        failing = request.request_id.endswith("-1")
        return [WorkerLostError("decode-1 died")] if failing else [asyncio.Event()]

    dispatcher.script = script
    with pytest.raises(openai.InternalServerError, match="decode-1 died") as caught:
        await chat(client, n=3)
    assert caught.value.status_code == 503
    await dispatcher.until_running(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_cuts_the_text_and_aborts_the_work(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel, stream: bool
) -> None:
    ids = text_model.encode_now("hello world", add_special_tokens=False)
    dispatcher.script = lambda request: [*(tokens(token_id) for token_id in ids), asyncio.Event()]
    answer = await chat(client, stop=["o w", "never"], stream=stream)
    if stream:
        chunks = [chunk async for chunk in answer]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        up_to_the_match = ids[: next(n for n in range(len(ids)) if "o w" in text_model.decode(ids[: n + 1])) + 1]
        assert answer.usage.completion_tokens == len(up_to_the_match)
    assert (text, finish) == ("hell", "stop")
    await dispatcher.until_running(0)
    assert not dispatcher.requests[0].sampling.stop, "stop strings are no business of the workers"


def with_logprobs(token_id: int, logprob: float, *top: tuple[int, float]) -> TokenDelta:
    chosen = Candidate(token_id=token_id, logprob=logprob)
    others = [Candidate(token_id=other, logprob=value) for other, value in top]
    return TokenDelta([token_id], [TokenLogprobs(chosen=chosen, top=others)])


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    letters = text_model.encode_now("aé", add_special_tokens=False)
    other = text_model.encode_now("z", add_special_tokens=False)[0]
    dispatcher.script = lambda request: [
        with_logprobs(letters[0], -0.5, (letters[0], -0.5), (other, float("-inf"))),
        with_logprobs(letters[1], -1.0),
        with_logprobs(letters[2], -2.0),
        last(min(text_model.eos_token_ids)),
    ]
    content = (await chat(client, logprobs=True, top_logprobs=2)).choices[0].logprobs.content
    assert dispatcher.requests[0].sampling.logprobs == 2
    assert [entry.token for entry in content] == ["a", "\\xc3", "\\xa9"]
    assert bytes(content[1].bytes + content[2].bytes).decode() == "é"
    assert [entry.logprob for entry in content] == [-0.5, -1.0, -2.0]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.5), ("z", -9999.0)]

    chunks = [chunk async for chunk in await chat(client, logprobs=True, stream=True)]
    streamed = [chunk.choices[0] for chunk in chunks if chunk.choices[0].logprobs]
    assert [(choice.delta.content, len(choice.logprobs.content)) for choice in streamed] == [("a", 1), ("é", 2)]


async def test_completion_logprobs_are_parallel_lists_with_offsets(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    a, b = text_model.encode_now("ab", add_special_tokens=False)
    dispatcher.script = lambda request: [with_logprobs(a, -0.5, (b, -0.25)), with_logprobs(b, -1.0, (b, -1.0)), last()]
    logprobs = (await complete(client, logprobs=1)).choices[0].logprobs
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.token_logprobs == [-0.5, -1.0]
    assert logprobs.top_logprobs == [{"b": -0.25, "a": -0.5}, {"b": -1.0}]
    assert logprobs.text_offset == [0, 1]


async def test_an_error_before_the_first_token_of_a_stream_is_a_status(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [NoWorkerError("all are busy", retry_after_s=3.2)]
    with pytest.raises(openai.InternalServerError, match="all are busy") as caught:
        await chat(client, stream=True)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "4"
    assert caught.value.code == "no_worker"


async def test_a_request_that_workers_die_of_is_not_sent_again_by_its_client(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [MigrationLimitError("4 workers were lost while they had this request")]
    with pytest.raises(openai.InternalServerError, match="4 workers were lost") as caught:
        await chat(client.with_options(max_retries=2))
    assert (caught.value.status_code, caught.value.code) == (503, "migration_limit")
    assert len(dispatcher.requests) == 1


async def test_an_error_in_the_middle_of_a_stream_is_an_event_the_client_raises(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    ids = text_model.encode_now("hello", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(*ids), WorkerLostError("decode-1 died")]
    stream = await chat(client, stream=True)
    assert (await anext(stream)).choices[0].delta.role == "assistant"
    assert (await anext(stream)).choices[0].delta.content == "hello"
    with pytest.raises(openai.APIError, match="decode-1 died"):
        await anext(stream)


async def test_a_stream_that_just_ends_is_an_error_and_not_an_answer(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: []
    with pytest.raises(openai.InternalServerError, match="gave up"):
        await chat(client)


async def test_an_unexpected_error_tells_nothing_of_the_inside(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [RuntimeError("secret detail")]
    with pytest.raises(openai.InternalServerError) as caught:
        await chat(client)
    assert caught.value.status_code == 500
    assert "secret" not in caught.value.response.text


async def test_the_account_comes_with_the_answer_when_asked_for(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher
) -> None:
    account = RequestAccount(
        prefill_worker="p1",
        decode_worker="d1",
        prompt_tokens=100,
        prefill_computed_tokens=36,
        prefill_cached_tokens=64,
        decode_computed_tokens=1,
        kv_bytes_moved=1 << 40,
    )
    dispatcher.script = lambda request: [last(account=account)]
    ask: Any = {"extra_body": {"slipstream": {"account": True}}}
    whole = await chat(client, **ask)
    plain = await chat(client, stream=True, **ask)
    with_usage = await complete(client, stream=True, stream_options={"include_usage": True}, **ask)
    for answer in (whole, [c async for c in plain][-1], [c async for c in with_usage][-1]):
        told = answer.model_extra["slipstream"]["account"]
        assert (told["prefill_worker"], told["decode_worker"], told["kv_bytes_moved"]) == ("p1", "d1", 1 << 40)
    assert whole.usage.prompt_tokens_details.cached_tokens == 64
    assert "slipstream" not in ((await chat(client)).model_extra or {})


async def test_the_workers_are_named_in_the_headers_of_a_whole_answer(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [last(account=RequestAccount(prefill_worker="p1", decode_worker="d1"))]
    response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert response.headers["x-slipstream-prefill-worker"] == "p1"
    assert response.headers["x-slipstream-decode-worker"] == "d1"


async def test_models_are_listed_and_found(client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher) -> None:
    listed = await client.models.list()
    assert [(model.id, model.object, model.created) for model in listed.data] == [("tiny", "model", 1_700_000_000)]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
    dispatcher.served = []
    assert (await client.models.list()).data == []
