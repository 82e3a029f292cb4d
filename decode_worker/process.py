"""`slipstream decode-worker`: hosts the decode role in this process.

It serves both roles' calls: what it generated may be wanted by a prefill worker, for the next turn.
"""

from __future__ import annotations

import grpc.aio

from decode_worker.service import DecodeService
from engine import host_process
from engine.admission import Admission
from engine.protocol import Engine
from kv_transfer.board import Board
from kv_transfer.leases import LeaseTable
from prefill_worker.service import PrefillService
from slipstream.settings import Settings
from slipstream.v1 import worker_pb2_grpc
from slipstream.v1.registry_pb2 import Role


def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises what `host_process.run` raises."""
    host_process.run(settings, Role.ROLE_DECODE, _add)


def _add(
    server: grpc.aio.Server, engine: Engine, admission: Admission, board: Board, model: str, settings: Settings
) -> tuple[str, ...]:
    lease_s = settings.transfer.lease_s
    leases = LeaseTable(board, lease_s=lease_s)
    handing_over = PrefillService(engine, leases, admission, model=model, lease_s=lease_s, computes=False)
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(DecodeService(engine, admission, model=model), server)
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(handing_over, server)
    return "slipstream.v1.DecodeWorker", "slipstream.v1.PrefillWorker"
