"""The global frontend's gRPC face before scripted clusters: failover, and answers that go on at another cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from frontend.cluster_state import ClusterState, ModelState
from frontend.clusters.fleet import ClusterFleet
from frontend.clusters.grpc_face import GlobalGrpcFace
from frontend.clusters.resume import Passed, resumable
from slipstream.grpc_errors import from_rpc_error
from slipstream.settings import GlobalFrontendSettings, PeerClusterSettings
from slipstream.v1 import inference_pb2_grpc
from slipstream.v1.inference_pb2 import (
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
    TokenIds,
)
from slipstream.v1.sampling_pb2 import FinishReason, SamplingParams

PROMPT = [5, 6, 7]


class Peer(inference_pb2_grpc.InferenceServicer):
    """Generates 100 more than the number of tokens before, so that an answer shows whether it went on rightly.

    Args:
        dies_after: tokens after which it is gone; None: never.
    """

    def __init__(self, dies_after: int | None = None) -> None:
        self.dies_after = dies_after
        self.seen: list[GenerateRequest] = []

    async def Generate(  # noqa: N802
        self, request: GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[GenerateResponse]:
        self.seen.append(request)
        before, wanted = len(request.token_ids.ids), request.sampling.max_tokens
        for number in range(wanted):
            if number == self.dies_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            response = GenerateResponse(
                model="sim", token_ids=[100 + before + number], text=f" {100 + before + number}"
            )
            if number == wanted - 1:
                response.finish_reason = FinishReason.FINISH_REASON_LENGTH
                response.usage.prompt_tokens, response.usage.completion_tokens = before, wanted
            yield response

    async def ListModels(  # noqa: N802
        self, request: ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ListModelsResponse:
        raise AssertionError("a global frontend knows the models from the clusters' states")


@asynccontextmanager
async def global_face(*peers: Peer) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    """Before these clusters, the first of which is the nearest."""
    async with AsyncExitStack() as stack:
        clusters = []
        for place, peer in enumerate(peers):
            server = grpc.aio.server()
            inference_pb2_grpc.add_InferenceServicer_to_server(peer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, 0)
            clusters.append(
                PeerClusterSettings(
                    name=f"c{place}", http=("http://127.0.0.1:9",), grpc=(f"127.0.0.1:{port}",), key="k"
                )
            )
        fleet = stack.enter_context(closing(ClusterFleet(GlobalFrontendSettings(clusters=tuple(clusters)), "global")))
        for place, member in enumerate(fleet.members):
            model = ModelState("sim", 8192, 1, 1, 0, [(1, 0.1)], {"realtime": float(place)})
            now_s = fleet.clock()
            member.known.heard(ClusterState(f"f{place}", True, False, 0.0, 1, [model]), now_s, now_s)
        face = GlobalGrpcFace(fleet, max_message_bytes=1 << 20, request_timeout_s=30)
        port = face.server.add_insecure_port("127.0.0.1:0")
        await face.start()
        stack.push_async_callback(face.stop, 0)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        yield inference_pb2_grpc.InferenceStub(channel)


def a_request(**more: Any) -> GenerateRequest:
    whole = {"token_ids": TokenIds(ids=PROMPT), "sampling": SamplingParams(max_tokens=8, temperature=0), **more}
    return GenerateRequest(model="sim", **whole)


async def answered(
    stub: inference_pb2_grpc.InferenceStub, request: GenerateRequest
) -> tuple[list[GenerateResponse], str]:
    call = cast("Any", stub.Generate(request, timeout=20))
    responses = [response async for response in call]
    trailing = {str(name): str(value) for name, value in await call.trailing_metadata() or ()}
    return responses, trailing.get("x-slipstream-cluster", "")


@pytest.mark.parametrize("dies_after", [1, 4, 7])
async def test_an_answer_goes_on_at_another_cluster_with_the_same_tokens_and_text(dies_after: int) -> None:
    first, second = Peer(dies_after), Peer()
    async with global_face(first, second) as stub:
        responses, cluster = await answered(stub, a_request())
    assert [token for one in responses for token in one.token_ids] == [103 + number for number in range(8)]
    assert "".join(one.text for one in responses) == "".join(f" {103 + number}" for number in range(8))
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 8)
    assert cluster == "c1; failover"
    (asked,) = second.seen
    assert list(asked.token_ids.ids) == PROMPT + [103 + number for number in range(dies_after)]
    assert asked.sampling.max_tokens == 8 - dies_after


async def test_an_answer_survives_two_clusters() -> None:
    async with global_face(Peer(2), Peer(3), Peer()) as stub:
        responses, _ = await answered(stub, a_request())
    assert [token for one in responses for token in one.token_ids] == [103 + number for number in range(8)]
    assert responses[-1].usage.completion_tokens == 8


async def test_one_that_had_all_its_tokens_is_only_ended() -> None:
    passed = Passed(a_request())
    passed.pass_on(GenerateResponse(token_ids=range(8)).SerializeToString())
    end = passed.take_over()
    assert isinstance(end, GenerateResponse)
    assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.FINISH_REASON_LENGTH, 8)


async def test_what_cannot_go_on_exactly_ends_with_an_error_that_says_so() -> None:
    async with global_face(Peer(3), Peer()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answered(stub, a_request(text="a text, whose tokens the global frontend does not know"))
    assert (caught.value.code(), from_rpc_error(caught.value).code) == (grpc.StatusCode.UNAVAILABLE, "cluster_lost")


async def test_when_no_cluster_is_left_the_broken_answer_is_said_to_be_broken() -> None:
    async with global_face(Peer(3)) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answered(stub, a_request())
    assert from_rpc_error(caught.value).code == "cluster_lost"


@pytest.mark.parametrize(
    ("more", "exact"),
    [
        ({}, True),
        ({"text": "hi"}, False),
        ({"sampling": SamplingParams(stop=["x"])}, False),
        ({"sampling": SamplingParams(seed=1, temperature=1)}, False),
        ({"sampling": SamplingParams(temperature=1)}, True),
    ],
)
def test_only_answers_that_depend_on_nothing_but_their_tokens_go_on(more: dict[str, Any], exact: bool) -> None:
    assert resumable(a_request(**more)) is exact


async def test_one_that_nobody_answers_at_is_passed_over_before_the_first_token() -> None:
    async with global_face(Peer(0), Peer()) as stub:
        responses, cluster = await answered(stub, a_request(text="any input will do"))
    assert (len(responses), cluster) == (8, "c1; failover")
