"""The gRPC face over a real channel."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from frontend.generation import ServedModel, TokenDelta
from frontend.tokenizer import TextModel
from slipstream.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    NoWorkerError,
    SlipstreamError,
    UnsupportedError,
)
from slipstream.grpc_errors import from_rpc_error
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from slipstream.v1.inference_pb2 import ChatInput, ChatMessage, GenerateRequest, TokenIds
from slipstream.v1.sampling_pb2 import Candidate, FinishReason, RequestAccount, SamplingParams, TokenLogprobs
from tests.support.scripted_dispatcher import ScriptedDispatcher, last, tokens
from tests.unit.frontend.conftest import Faces


async def generate(channel: grpc.aio.Channel, request: GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=20)
    return [response async for response in call]


async def refusal(channel: grpc.aio.Channel, request: GenerateRequest) -> SlipstreamError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, request)
    return from_rpc_error(caught.value)


async def test_text_is_answered_token_by_token_with_usage_and_account_at_the_end(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    ids = text_model.encode_now("hello world", add_special_tokens=False)
    eos = min(text_model.eos_token_ids)
    account = RequestAccount(decode_worker="d1", prompt_tokens=4, prefill_cached_tokens=2, prefill_computed_tokens=2)
    dispatcher.script = lambda request: [*(tokens(one) for one in ids), last(eos, account=account)]
    responses = await generate(channel, GenerateRequest(model="tiny", text="abc", request_id="mine"))
    assert "".join(response.text for response in responses) == "hello world"
    assert [token_id for response in responses for token_id in response.token_ids] == [*ids, eos]
    assert {(response.request_id, response.model) for response in responses} == {("mine", "tiny")}
    final = responses[-1]
    assert final.finish_reason == FinishReason.FINISH_REASON_STOP
    assert final.account == account
    assert (final.usage.prompt_tokens, final.usage.completion_tokens, final.usage.cached_tokens) == (
        len(text_model.encode_now("abc", add_special_tokens=True)),
        len(ids) + 1,
        2,
    )
    assert not any(response.finish_reason or response.HasField("usage") for response in responses[:-1])


async def test_token_ids_are_used_as_they_are_and_chats_are_rendered(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    await generate(channel, GenerateRequest(token_ids=TokenIds(ids=[3, 1, 2])))
    chat = ChatInput(messages=[ChatMessage(role="user", content="hi")])
    await generate(channel, GenerateRequest(chat=chat))
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [list(request.token_ids) for request in dispatcher.requests] == [
        [3, 1, 2],
        text_model.encode_now(rendered, add_special_tokens=False),
    ]


async def test_sampling_reaches_the_workers_without_stop_strings(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    sampling = SamplingParams(temperature=0.5, seed=-3, logit_bias={4: 2.5}, stop_token_ids=[7], logprobs=3, stop=["l"])
    responses = await generate(channel, GenerateRequest(text="x", sampling=sampling))
    assert "".join(response.text for response in responses) == "he"
    assert responses[-1].stop_reason == "l"
    got = dispatcher.requests[0].sampling
    sampling.ClearField("stop")
    sampling.max_tokens = got.max_tokens
    sampling.stop_token_ids[:] = sorted({7, *text_model.eos_token_ids})
    assert got == sampling
    assert got.max_tokens + len(dispatcher.requests[0].token_ids) == 256


async def test_logprobs_come_one_for_each_token_as_it_arrives(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    ids = text_model.encode_now("é", add_special_tokens=False)
    chosen = [TokenLogprobs(chosen=Candidate(token_id=one, logprob=-1)) for one in ids]
    dispatcher.script = lambda request: [
        *(TokenDelta([one], [logprobs]) for one, logprobs in zip(ids, chosen, strict=True)),
        last(),
    ]
    responses = await generate(channel, GenerateRequest(text="x", sampling=SamplingParams(logprobs=0)))
    assert [(response.text, len(response.token_ids), len(response.logprobs)) for response in responses] == [
        ("", 1, 1),
        ("é", 1, 1),
        ("", 0, 0),
    ]


@pytest.mark.parametrize(
    ("request_", "kind", "param"),
    [
        (GenerateRequest(), InvalidRequestError, "input"),
        (GenerateRequest(chat=ChatInput()), InvalidRequestError, "chat.messages"),
        (GenerateRequest(token_ids=TokenIds()), InvalidRequestError, "token_ids"),
        (GenerateRequest(token_ids=TokenIds(ids=[2**32 - 1])), InvalidRequestError, "token_ids"),
        (GenerateRequest(token_ids=TokenIds(ids=[1] * 300)), ContextLengthError, "token_ids"),
        (GenerateRequest(text="x", model="other"), ModelNotFoundError, "model"),
        (
            GenerateRequest(text="x", sampling=SamplingParams(temperature=float("nan"))),
            InvalidRequestError,
            "temperature",
        ),
        (GenerateRequest(text="x", sampling=SamplingParams(max_tokens=0)), InvalidRequestError, "max_tokens"),
        (GenerateRequest(text="x", sampling=SamplingParams(stop=[""])), InvalidRequestError, "stop.0"),
        (GenerateRequest(text="x", sampling=SamplingParams(logprobs=99)), InvalidRequestError, "logprobs"),
        (
            GenerateRequest(text="x", sampling=SamplingParams(logit_bias={2**32 - 1: 1})),
            InvalidRequestError,
            "logit_bias.4294967295",
        ),
    ],
)
async def test_bad_input_is_the_same_typed_error_as_over_http(
    channel: grpc.aio.Channel, request_: GenerateRequest, kind: type[SlipstreamError], param: str
) -> None:
    error = await refusal(channel, request_)
    assert (type(error), error.param) == (kind, param)


async def test_a_workers_loss_is_unavailable_with_its_code_and_retry(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [NoWorkerError("none left", retry_after_s=1.5)]
    error = await refusal(channel, GenerateRequest(text="x"))
    assert (type(error), error.message, error.retry_after_s) == (NoWorkerError, "none left", 1.5)


async def test_an_unexpected_error_tells_nothing_of_the_inside(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda request: [RuntimeError("secret detail")]
    error = await refusal(channel, GenerateRequest(text="x"))
    assert (type(error), "secret" in error.message) == (SlipstreamError, False)


async def test_a_model_without_template_refuses_chat(
    channel: grpc.aio.Channel, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_model, "chat_template", None)
    chat = ChatInput(messages=[ChatMessage(role="user", content="hi")])
    assert isinstance(await refusal(channel, GenerateRequest(chat=chat)), UnsupportedError)


async def test_models_are_listed(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    dispatcher.served = [ServedModel("tiny", 256, 2, 3, 5)]
    response = await inference_pb2_grpc.InferenceStub(channel).ListModels(inference_pb2.ListModelsRequest())
    [model] = response.models
    assert (model.id, model.max_model_len, model.prefill_workers, model.decode_workers, model.created) == (
        "tiny",
        256,
        2,
        3,
        5,
    )


async def test_health_follows_readiness(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    watching: Any = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="slipstream.v1.Inference"), timeout=20
    )
    serving = health_pb2.HealthCheckResponse.ServingStatus

    async def until(status: Any) -> None:
        async with asyncio.timeout(10):
            while (await watching.read()).status != status:
                pass

    await until(serving.SERVING)
    dispatcher.ready = False
    await until(serving.NOT_SERVING)
    dispatcher.ready = True
    await until(serving.SERVING)
    watching.cancel()


async def test_reflection_describes_the_service(faces: Faces) -> None:
    def described() -> list[str]:
        with grpc.insecure_channel(faces.grpc) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            return [method.name for method in pool.FindServiceByName("slipstream.v1.Inference").methods]

    assert await asyncio.to_thread(described) == ["Generate", "ListModels"]
