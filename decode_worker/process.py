"""`slipstream decode-worker`: hosts the decode role in this process."""

from __future__ import annotations

import grpc.aio

from decode_worker.service import DecodeService
from engine import host_process
from engine.admission import Admission
from engine.protocol import Engine
from kv_transfer.board import Board
from slipstream.settings import Settings
from slipstream.v1 import worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role


def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises what `host_process.run` raises."""
    host_process.run(settings, Role.ROLE_DECODE, _add)


def _add(
    server: grpc.aio.Server, engine: Engine, admission: Admission, board: Board, model: str, settings: Settings
) -> str:
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(DecodeService(engine, admission, model=model), server)
    return "slipstream.v1.DecodeWorker"
