"""`slipstream prefill-worker`: hosts the prefill role in this process."""

from __future__ import annotations

import grpc.aio

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
    host_process.run(settings, Role.ROLE_PREFILL, _add)


def _add(
    server: grpc.aio.Server, engine: Engine, admission: Admission, board: Board, model: str, settings: Settings
) -> tuple[str, ...]:
    lease_s = settings.transfer.lease_s
    leases = LeaseTable(board, lease_s=lease_s)
    service = PrefillService(engine, leases, admission, model=model, lease_s=lease_s, computes=True)
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(service, server)
    return ("slipstream.v1.PrefillWorker",)
