"""The calls of both roles, which every worker serves.

A role says what a worker is asked for, not what it can do: what a decode worker generated is wanted by a prefill
worker for the next turn, and a worker whose role is changed answers those who have not heard of it yet.
"""

from __future__ import annotations

import grpc.aio

from decode_worker.service import DecodeService
from engine.admission import Admission
from engine.protocol import Engine
from kv_transfer.board import Board
from kv_transfer.leases import LeaseTable
from prefill_worker.service import PrefillService
from slipstream.settings import Settings
from slipstream.v1 import worker_pb2_grpc


def add_services(
    server: grpc.aio.Server, engine: Engine, admission: Admission, board: Board, model: str, settings: Settings
) -> tuple[str, ...]:
    """An `engine.host_process.AddServices`."""
    lease_s = settings.transfer.lease_s
    leases = LeaseTable(board, lease_s=lease_s)
    handing_over = PrefillService(engine, leases, admission, model=model, lease_s=lease_s)
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(DecodeService(engine, admission, model=model), server)
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(handing_over, server)
    return "slipstream.v1.DecodeWorker", "slipstream.v1.PrefillWorker"
