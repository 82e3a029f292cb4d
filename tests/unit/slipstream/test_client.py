"""What a user of `slipstream.client` can rely on, in its synchronous and its asynchronous form."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import fields

import grpc
import pytest

import slipstream.client
from slipstream.client import Account, AsyncClient, Candidate, Client, SamplingOptions, TokenLogprob, Usage
from slipstream.errors import (
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    NoWorkerError,
    SlipstreamError,
    UnavailableError,
    WorkerLostError,
)
from slipstream.v1 import inference_pb2, sampling_pb2
from tests.unit.slipstream.scripted_inference import FINAL, Script, serve

PARIS = [
    inference_pb2.GenerateResponse(text="Par", token_ids=[7]),
    inference_pb2.GenerateResponse(text="is", token_ids=[8]),
    FINAL,
]


@pytest.fixture
def script() -> Script:
    return Script(responses=list(PARIS))


@pytest.fixture
def target(script: Script) -> Iterator[str]:
    with serve(script) as address:
        yield address


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout_s=20) as client:
        yield client


def test_the_public_names_are_exactly_these() -> None:
    assert slipstream.client.__all__ == [
        "Account",
        "AsyncClient",
        "AsyncStream",
        "Candidate",
        "ChatMessage",
        "Client",
        "Completion",
        "ModelInfo",
        "Piece",
        "SamplingOptions",
        "Stream",
        "Tls",
        "TokenLogprob",
        "Usage",
    ]


def test_account_has_exactly_the_fields_of_the_wire_message() -> None:
    on_the_wire = [field.name for field in sampling_pb2.RequestAccount.DESCRIPTOR.fields]
    assert [field.name for field in fields(Account)] == on_the_wire


def test_sampling_options_are_exactly_the_fields_of_the_wire_message() -> None:
    on_the_wire = {field.name for field in sampling_pb2.SamplingParams.DESCRIPTOR.fields}
    assert set(SamplingOptions.__annotations__) == on_the_wire


def test_generate_yields_the_pieces_in_order(client: Client) -> None:
    assert [piece.text for piece in client.generate("France?")] == ["Par", "is", "."]


def test_the_last_piece_says_why_it_ended_and_what_it_cost(client: Client) -> None:
    *_, last = client.generate("France?")
    assert (last.finish_reason, last.stop_reason, last.usage) == ("stop", "9", Usage(5, 3, 2))
    assert last.account is not None
    assert (last.account.prefill_worker, last.account.kv_bytes_moved) == ("prefill-0", 4096)


def test_complete_puts_the_answer_together(client: Client) -> None:
    answer = client.complete("France?")
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Paris.", (7, 8, 9), "stop")
    assert (answer.model, answer.request_id) == ("tiny", "r-1")


async def test_an_answer_that_has_ended_says_why_it_went_to_its_workers(target: str, script: Script) -> None:
    script.metadata = (("x-slipstream-route", "prefix_hit"),)
    with Client(target, timeout_s=20) as client:
        stream = client.generate("France?")
        next(stream)
        assert stream.route == ""
        assert (stream.collect().route, stream.route) == ("prefix_hit", "prefix_hit")
    async with AsyncClient(target, timeout_s=20) as client:
        assert (await client.complete("France?")).route == "prefix_hit"


def test_logprobs_arrive_with_their_tokens(client: Client, script: Script) -> None:
    logprobs = sampling_pb2.TokenLogprobs(
        chosen=sampling_pb2.Candidate(token_id=7, logprob=-0.5),
        top=[sampling_pb2.Candidate(token_id=7, logprob=-0.5), sampling_pb2.Candidate(token_id=3, logprob=-2.0)],
    )
    script.responses.insert(0, inference_pb2.GenerateResponse(text="P", token_ids=[7], logprobs=[logprobs]))
    expected = TokenLogprob(Candidate(7, -0.5), (Candidate(7, -0.5), Candidate(3, -2.0)))
    assert client.complete("France?", logprobs=2).logprobs == (expected,)


def test_every_sampling_parameter_travels_under_its_own_name(client: Client, script: Script) -> None:
    client.complete(
        "x",
        model="tiny",
        request_id="mine",
        max_tokens=3,
        min_tokens=1,
        temperature=0.0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        seed=-4,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logprobs=0,
        ignore_eos=True,
        logit_bias={5: -100.0},
        stop_token_ids=[2, 3],
        stop=["\n", "END"],
    )
    sampling = sampling_pb2.SamplingParams(
        max_tokens=3,
        min_tokens=1,
        temperature=0.0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        seed=-4,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logprobs=0,
        ignore_eos=True,
        logit_bias={5: -100.0},
        stop_token_ids=[2, 3],
        stop=["\n", "END"],
    )
    expected = inference_pb2.GenerateRequest(model="tiny", request_id="mine", text="x", sampling=sampling)
    assert script.requests == [expected]


def test_a_parameter_that_is_none_is_not_sent(client: Client, script: Script) -> None:
    client.complete("x", temperature=None, stop=None)
    assert script.requests[0].sampling == sampling_pb2.SamplingParams()


def test_one_stop_string_needs_no_list(client: Client, script: Script) -> None:
    client.complete("x", stop="END")
    assert list(script.requests[0].sampling.stop) == ["END"]


def test_token_ids_are_sent_as_they_are(client: Client, script: Script) -> None:
    client.complete([1, 2, 3])
    assert script.requests[0].token_ids.ids == [1, 2, 3]


def test_an_empty_list_of_token_ids_is_still_token_ids(client: Client, script: Script) -> None:
    client.complete([])
    assert script.requests[0].WhichOneof("input") == "token_ids"


def test_chat_sends_the_conversation(client: Client, script: Script) -> None:
    client.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]).collect()
    sent = [(message.role, message.content) for message in script.requests[0].chat.messages]
    assert sent == [("system", "Be brief."), ("user", "Hi")]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temprature": 1.0}, "did you mean temperature"),
        ({"max_tokens": -1}, "max_tokens = -1"),
        ({"max_tokens": "many"}, "max_tokens = 'many'"),
        ({"stop_token_ids": "ab"}, "stop_token_ids = 'ab'"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"zzz": 1}, "known are"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_is_sent(
    client: Client, script: Script, options: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidRequestError, match=named) as caught:
        client.generate("x", **options)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(options))
    assert script.requests == []


def test_a_prompt_of_something_else_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="token ids"):
        client.generate(["a"])  # type: ignore[list-item]


def test_a_message_without_content_is_named(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[1\]"):
        client.chat([{"role": "user", "content": "a"}, {"role": "user"}])  # type: ignore[typeddict-item]


def test_models_are_listed(client: Client, script: Script) -> None:
    script.models = [
        inference_pb2.Model(id="tiny", max_model_len=64, prefill_workers=1, decode_workers=2, created=1700000000)
    ]
    (model,) = client.models()
    assert (model.id, model.max_model_len, model.decode_workers, model.created_unix_s) == ("tiny", 64, 2, 1700000000)


def test_leaving_the_loop_cancels_the_call(client: Client, script: Script) -> None:
    script.endless = True
    for _ in client.generate("x"):
        break
    assert script.cancelled.wait(10)


def test_closing_the_stream_cancels_the_call_and_ends_the_iteration(client: Client, script: Script) -> None:
    script.endless = True
    with client.generate("x") as stream:
        next(stream)
    assert list(stream) == []
    assert script.cancelled.wait(10)


def test_an_error_of_the_cluster_comes_back_as_its_own_type(client: Client, script: Script) -> None:
    script.error, script.error_message = grpc.StatusCode.NOT_FOUND, "no model gpt-9; served: tiny"
    script.error_metadata = (("slipstream-code", "model_not_found"), ("slipstream-param", "model"))
    with pytest.raises(ModelNotFoundError, match="no model gpt-9") as caught:
        client.complete("x", model="gpt-9")
    assert caught.value.param == "model"


def test_pieces_before_an_error_are_not_lost(client: Client, script: Script) -> None:
    script.responses, script.error = PARIS[:1], grpc.StatusCode.UNAVAILABLE
    script.error_metadata = (("slipstream-code", "no_worker"),)
    stream = client.generate("x")
    assert next(stream).text == "Par"
    with pytest.raises(NoWorkerError):
        next(stream)


def test_a_stream_that_just_stops_is_an_error_and_not_a_short_answer(client: Client, script: Script) -> None:
    script.responses = PARIS[:2]
    with pytest.raises(WorkerLostError, match="incomplete"):
        client.complete("x")


def test_no_frontend_at_the_address_is_said_with_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nothing else takes the port, and it refuses
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address) as client, pytest.raises(UnavailableError, match=address):
            client.models(timeout_s=20)


def test_a_silent_frontend_is_given_up_at_the_timeout(client: Client, script: Script) -> None:
    script.responses, script.silent = [], True
    with pytest.raises(DeadlineError, match=r"timeout_s = 0\.2"):
        client.complete("x", timeout_s=0.2)
    assert script.cancelled.wait(10)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_wait_without_an_end_is_not_offered(client: Client, timeout_s: float) -> None:
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        client.complete("x", timeout_s=timeout_s)


async def test_async_generate_yields_the_pieces_in_order(target: str) -> None:
    async with AsyncClient(target) as client:
        assert [piece.text async for piece in client.generate("France?")] == ["Par", "is", "."]


async def test_async_complete_and_chat_and_models(target: str, script: Script) -> None:
    script.models = [inference_pb2.Model(id="tiny")]
    async with AsyncClient(target) as client:
        assert (await client.complete([1, 2], max_tokens=4)).text == "Paris."
        assert (await client.chat([{"role": "user", "content": "Hi"}]).collect()).finish_reason == "stop"
        assert [model.id for model in await client.models()] == ["tiny"]
    assert [request.WhichOneof("input") for request in script.requests] == ["token_ids", "chat"]


async def test_async_leaving_the_scope_cancels_the_call(target: str, script: Script) -> None:
    script.endless = True
    async with AsyncClient(target) as client:
        async with client.generate("x") as stream:
            await anext(stream)
        assert await asyncio.to_thread(script.cancelled.wait, 10)
        assert [piece async for piece in stream] == []


async def test_async_breaking_out_of_the_loop_cancels_the_call(target: str, script: Script) -> None:
    script.endless = True
    async with AsyncClient(target) as client:
        async for _ in client.generate("x"):
            break
        assert await asyncio.to_thread(script.cancelled.wait, 10)


async def test_cancelling_the_reading_task_cancels_the_call(target: str, script: Script) -> None:
    script.responses, script.silent = PARIS[:1], True
    async with AsyncClient(target) as client:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in client.generate("x"):
                started.set()

        task = asyncio.create_task(read())
        async with asyncio.timeout(10):
            await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(script.cancelled.wait, 10)


async def test_async_errors_are_typed_too(target: str, script: Script) -> None:
    script.responses, script.silent = [], True
    async with AsyncClient(target) as client:
        with pytest.raises(DeadlineError):
            await client.complete("x", timeout_s=0.2)
        script.silent, script.error = False, grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(InvalidRequestError):
            await client.complete("x")
        script.error = grpc.StatusCode.INTERNAL
        with pytest.raises(SlipstreamError):
            await client.complete("x")
