"""Gives a worker the other role: the worker itself is asked, whatever runs it."""

from __future__ import annotations

from collections.abc import Iterable

import grpc.aio

from slipstream.errors import UnavailableError
from slipstream.grpc_channels import client_options
from slipstream.grpc_errors import from_rpc_error
from slipstream.security.channels import open_channel
from slipstream.security.names import ComponentRole
from slipstream.v1.registry_pb2 import Role, WorkerRecord, WorkerState
from slipstream.v1.worker_pb2 import SetRoleRequest
from slipstream.v1.worker_pb2_grpc import WorkerStub


async def change_role(
    records: Iterable[WorkerRecord], worker_id: str, role: Role.ValueType, *, timeout_s: float
) -> None:
    """Returns once the worker has taken the role.

    Args:
        records: of the workers as the registry has them.

    Raises:
        UnavailableError: it is not there, not ready, or is ending.
        SlipstreamError: it refused, or did not answer in time.
    """
    record = next((one for one in records if one.worker_id == worker_id), None)
    if record is None or record.state != WorkerState.READY:
        raise UnavailableError(f"{worker_id} is not there, or not ready: its role cannot be changed")
    async with open_channel(record.address, peer=ComponentRole.WORKER, options=client_options()) as channel:
        try:
            await WorkerStub(channel).SetRole(SetRoleRequest(role=role, epoch=record.epoch), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
