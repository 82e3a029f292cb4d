"""Channels live as long as their worker is in the view or a call needs them."""

from __future__ import annotations

import socket

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from frontend.worker_channels import Place, WorkerChannels
from slipstream.free_ports import free_port

ONE, OTHER = Place("127.0.0.1:1", 1), Place("127.0.0.1:2", 1)


def is_closed(channel: grpc.aio.Channel) -> bool:
    try:
        return channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    except grpc.aio.UsageError:
        return True


async def test_one_channel_serves_all_calls_to_a_worker() -> None:
    async with WorkerChannels() as channels:
        assert channels.acquire(ONE) is channels.acquire(ONE)
        assert channels.acquire(OTHER) is not channels.acquire(ONE)


async def test_a_channel_outlives_its_worker_while_a_call_uses_it() -> None:
    async with WorkerChannels() as channels:
        channel = channels.acquire(ONE)
        await channels.retain(set())
        assert not is_closed(channel)
        channels.release(ONE)
        await channels.retain({ONE})
        assert not is_closed(channel)
        await channels.retain(set())
        assert is_closed(channel)


async def test_leaving_closes_every_channel_and_a_late_release_is_harmless() -> None:
    async with WorkerChannels() as channels:
        channel = channels.acquire(ONE)
    assert is_closed(channel)
    channels.release(ONE)


async def test_a_worker_started_again_at_its_address_is_reached_at_once() -> None:
    """The channel of its last incarnation pauses after each refused attempt, and fails calls meanwhile."""
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))  # bound and not listening: it refuses
        before, after = Place(f"127.0.0.1:{port}", 1), Place(f"127.0.0.1:{port}", 2)
        async with WorkerChannels() as channels:
            dead = channels.acquire(before)
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError, match="refused"):
                    await health_pb2_grpc.HealthStub(dead).Check(health_pb2.HealthCheckRequest(), timeout=5)
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
            taken.close()
            assert server.add_insecure_port(after.address) == port
            await server.start()
            try:
                stub = health_pb2_grpc.HealthStub(channels.acquire(after))
                assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status
            finally:
                await server.stop(None)
