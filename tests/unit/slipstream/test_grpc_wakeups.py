"""The event loop takes many of gRPC's events at one wake-up. In a process of its own: it is installed once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio
import socket
from slipstream import grpc_wakeups

ends, pair = [], socket.socketpair
socket.socketpair = lambda *given: ends.append(pair(*given)) or ends[-1]
reads = []
receive = grpc_wakeups._DrainingSocket.recv
grpc_wakeups._DrainingSocket.recv = lambda *given: reads.append(receive(*given)) or reads[-1]
grpc_wakeups.install()
socket.socketpair = pair
grpc_wakeups.install()

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def ask():
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answers = await asyncio.gather(*(check(health_pb2.HealthCheckRequest()) for _ in range(300)))
    await server.stop(0)
    return len(answers)

print(asyncio.run(ask()), len(reads), sum(map(len, reads)), len(ends) > 0, any(end.getblocking() for _, end in ends))
"""


def test_no_event_is_missed_and_wake_ups_are_shared() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    answers, reads, events, pairs, waits = run.stdout.split()
    assert int(answers) == 300
    assert int(reads) < int(events), "several events at one wake-up"
    assert (pairs, waits) == ("True", "False"), "the poller never waits for the loop to read its bytes"
