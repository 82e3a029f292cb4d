"""A server that stops while somebody connects to it ends as it should. In a process of its own: gRPC 1.78, any release
of it, ends the process with a segmentation fault here (grpc/grpc#41630)."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio
from slipstream.security.servers import create_server

async def stop_with_a_connection_that_begins():
    server = create_server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _, client = await asyncio.open_connection("127.0.0.1", port)
    client.write(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n")
    client.close()
    await server.stop(0)

async def main():
    for _ in range(100):
        await stop_with_a_connection_that_begins()
    print("stopped")

asyncio.run(main())
"""


def test_a_server_stops_while_a_connection_begins() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "stopped\n"), run.stderr
