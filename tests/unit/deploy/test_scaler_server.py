"""A launcher's scaler on a socket: it listens or says why not; bytes that are no message are the caller's mistake."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from deploy.scaler_server import served
from slipstream.errors import StartupError
from slipstream.v1.scaler_pb2_grpc import ScalerServicer

NOTHING = ScalerServicer()  # type: ignore[abstract]  # every call is unimplemented


async def test_a_socket_that_cannot_be_made_is_said_with_its_setting(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/none/scaler.sock"
    with pytest.raises(StartupError, match=r"planner.scaler: cannot listen on unix:.*/none/scaler.sock"):
        async with served(NOTHING, address):
            pass


async def test_beyond_this_machine_it_is_not_open_to_everybody() -> None:
    with pytest.raises(StartupError, match=r"the scaler \(planner.scaler\) would listen on 0.0.0.0:0"):
        async with served(NOTHING, "0.0.0.0:0"):
            pass


async def test_what_is_no_message_is_refused_on_a_socket_too(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/scaler.sock"
    async with served(NOTHING, address), grpc.aio.insecure_channel(address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/slipstream.v1.Scaler/StartWorker")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\xff\xff\xff\xff", timeout=5)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
