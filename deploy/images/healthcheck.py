"""Asks the process of a container how it is; what the images' HEALTHCHECK runs. Exit status 0: well.

    healthcheck.py http URL          a frontend
    healthcheck.py grpc HOST:PORT    a control plane
    healthcheck.py worker            a worker, at the address that its environment names

A script of its own, which imports nothing of ours: it runs each few seconds beside the process that it asks.
"""

from __future__ import annotations

import os
import sys
import urllib.request

TIMEOUT_S = 3.0


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "http":
        return _http(arguments[1])
    if len(arguments) == 2 and arguments[0] == "grpc":
        return _grpc(arguments[1])
    if arguments == ["worker"]:
        host = os.environ.get("SLIPSTREAM_WORKER__HOST", "127.0.0.1")
        address = f"[{host}]" if ":" in host else host
        return _grpc(f"{address}:{os.environ.get('SLIPSTREAM_WORKER__PORT', '7700')}")
    return _say(__doc__ or "", 2)


def _http(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return 0 if response.status == 200 else _say(f"{url}: {response.status}", 1)
    except OSError as error:
        return _say(f"{url}: {error}", 1)


def _grpc(address: str) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
    except grpc.RpcError as error:
        return _say(f"{address}: {error}", 1)
    serving = health_pb2.HealthCheckResponse.SERVING
    return (
        0 if status == serving else _say(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}", 1)
    )


def _say(words: str, status: int) -> int:
    print(words, file=sys.stderr)  # noqa: T201  # Docker keeps what a check prints
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
