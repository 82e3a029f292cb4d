"""Channels live as long as their worker is in the view or a call needs them."""

from __future__ import annotations

import grpc
import grpc.aio

from frontend.worker_channels import WorkerChannels


def is_closed(channel: grpc.aio.Channel) -> bool:
    try:
        return channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    except grpc.aio.UsageError:
        return True


async def test_one_channel_serves_all_calls_to_an_address() -> None:
    async with WorkerChannels() as channels:
        assert channels.acquire("127.0.0.1:1") is channels.acquire("127.0.0.1:1")
        assert channels.acquire("127.0.0.1:2") is not channels.acquire("127.0.0.1:1")


async def test_a_channel_outlives_its_worker_while_a_call_uses_it() -> None:
    async with WorkerChannels() as channels:
        channel = channels.acquire("127.0.0.1:1")
        await channels.retain(set())
        assert not is_closed(channel)
        channels.release("127.0.0.1:1")
        await channels.retain({"127.0.0.1:1"})
        assert not is_closed(channel)
        await channels.retain(set())
        assert is_closed(channel)


async def test_leaving_closes_every_channel_and_a_late_release_is_harmless() -> None:
    async with WorkerChannels() as channels:
        channel = channels.acquire("127.0.0.1:1")
    assert is_closed(channel)
    channels.release("127.0.0.1:1")
