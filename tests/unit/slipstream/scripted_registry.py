"""A real gRPC server on loopback that plays the registry with a set of workers written by a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from slipstream.v1 import registry_pb2
from slipstream.v1.registry_pb2_grpc import RegistryServicer, add_RegistryServicer_to_server
from tests.unit.slipstream.serving import serving


class ScriptedRegistry(RegistryServicer):
    """Sends the sets it is given, one after the other, to every watcher, and then keeps the stream open."""

    def __init__(self, sets: list[registry_pb2.WorkerSet]) -> None:
        self._sets = sets

    def Watch(  # noqa: N802
        self, request: registry_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[registry_pb2.WorkerSet]:
        over = threading.Event()
        context.add_callback(over.set)
        yield from self._sets
        over.wait(60)

    def Register(  # noqa: N802
        self, request: registry_pb2.RegisterRequest, context: grpc.ServicerContext
    ) -> registry_pb2.RegisterResponse:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "the set is written by the test")

    def Deregister(  # noqa: N802
        self, request: registry_pb2.DeregisterRequest, context: grpc.ServicerContext
    ) -> registry_pb2.DeregisterResponse:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "the set is written by the test")


@contextmanager
def serve(sets: list[registry_pb2.WorkerSet]) -> Iterator[str]:
    """Serve on a free port; yields the address."""
    service = ScriptedRegistry(sets)
    with serving(lambda server: add_RegistryServicer_to_server(service, server), threads=4) as address:
        yield address


def record(
    worker_id: str,
    role: registry_pb2.Role.ValueType = registry_pb2.ROLE_DECODE,
    state: registry_pb2.WorkerState.ValueType = registry_pb2.READY,
) -> registry_pb2.WorkerRecord:
    return registry_pb2.WorkerRecord(
        worker_id=worker_id,
        role=role,
        state=state,
        model="tiny",
        address="127.0.0.1:7001",
        metrics_url="http://127.0.0.1:7002/metrics",
        epoch=1,
        pid=42,
        started_unix_s=1_700_000_000,
        device="cpu",
        capacity=registry_pb2.Capacity(max_model_len=2048, block_tokens=16, blocks=200, block_bytes=1 << 20),
        load=registry_pb2.Load(
            running=3,
            waiting=1,
            blocks_used=50,
            requests_total=1234,
            tokens_total=5_000_000_000,
            handoffs_held=2,
            fallbacks_total=7,
        ),
    )
