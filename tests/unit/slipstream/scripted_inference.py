"""A real gRPC server on loopback that plays the public face with answers written by a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from slipstream.v1 import inference_pb2, sampling_pb2
from slipstream.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from tests.unit.slipstream.serving import serving

FINAL = inference_pb2.GenerateResponse(
    request_id="r-1",
    model="tiny",
    text=".",
    token_ids=[9],
    finish_reason=sampling_pb2.FINISH_REASON_STOP,
    stop_reason="9",
    usage=inference_pb2.Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2),
    account=sampling_pb2.RequestAccount(
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        prompt_tokens=5,
        prefill_computed_tokens=3,
        prefill_cached_tokens=2,
        decode_computed_tokens=1,
        kv_blocks_moved=1,
        kv_bytes_moved=4096,
        transfer_s=0.002,
        prefill_s=0.01,
        transport="shm/direct",
        attempts=1,
    ),
)


@dataclass
class Script:
    """What the server says next, and what it has seen."""

    responses: list[inference_pb2.GenerateResponse] = field(default_factory=list)
    endless: bool = False
    silent: bool = False
    error: grpc.StatusCode | None = None
    error_message: str = ""
    error_metadata: tuple[tuple[str, str], ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    models: list[inference_pb2.Model] = field(default_factory=list)
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


class ScriptedInference(InferenceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        script = self._script
        script.requests.append(request)
        over = threading.Event()
        finished = False

        def ended() -> None:
            over.set()
            if not finished:
                script.cancelled.set()

        context.add_callback(ended)
        yield from script.responses
        while (script.endless or script.silent) and not over.wait(0.005):
            if script.endless:
                yield inference_pb2.GenerateResponse(text="again ", token_ids=[1])
        finished = not over.is_set()
        context.set_trailing_metadata(script.metadata)
        if script.error is not None:
            context.set_trailing_metadata(script.error_metadata)
            context.abort(script.error, script.error_message)

    def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=self._script.models)


@contextmanager
def serve(script: Script) -> Iterator[str]:
    """Serve `script` on a free port; yields the address."""
    service = ScriptedInference(script)
    with serving(lambda server: add_InferenceServicer_to_server(service, server), threads=8) as address:
        yield address
