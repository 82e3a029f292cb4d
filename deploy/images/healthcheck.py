"""Asks the process of a container how it is; what the images' HEALTHCHECK runs. Exit status 0: well.

    healthcheck.py http URL [FOLDER] a frontend, or the metrics of a worker that serves nothing else
    healthcheck.py grpc HOST:PORT [SERVICE [FOLDER]]
                                     a control plane, or what SERVICE says
    healthcheck.py worker            a worker, at the address that its environment names

With the certificate in FOLDER (tls.crt, tls.key, ca.crt), which must be the asked process' own. $POD_IP is filled in.
A script of its own, which imports nothing of ours: it runs each few seconds beside the process that it asks.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc

TIMEOUT_S = 3.0


def main(arguments: list[str]) -> int:
    if 2 <= len(arguments) <= 3 and arguments[0] == "http":
        return _http(_filled(arguments[1]), *arguments[2:])
    if 2 <= len(arguments) <= 4 and arguments[0] == "grpc":
        return _grpc(_filled(arguments[1]), *arguments[2:])
    if arguments == ["worker"]:
        host = os.environ.get("SLIPSTREAM_WORKER__HOST", "127.0.0.1")
        address = f"[{host}]" if ":" in host else host
        return _grpc(f"{address}:{os.environ.get('SLIPSTREAM_WORKER__PORT', '7700')}")
    return _say(__doc__ or "", 2)


def _filled(address: str) -> str:
    pod = os.environ.get("POD_IP", "127.0.0.1")
    return address.replace("$POD_IP", f"[{pod}]" if ":" in pod else pod)


def _http(url: str, folder: str = "") -> int:
    try:
        context = _context(Path(folder)) if folder else None
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context) as response:
            return 0 if response.status == 200 else _say(f"{url}: {response.status}", 1)
    except OSError as error:
        return _say(f"{url}: {error}", 1)


def _grpc(address: str, service: str = "", folder: str = "") -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        with _secure(address, Path(folder)) if folder else grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status
    except OSError as error:
        return _say(f"{folder}: {error}", 1)
    except grpc.RpcError as error:
        return _say(f"{address}: {error}", 1)
    serving = health_pb2.HealthCheckResponse.SERVING
    return (
        0 if status == serving else _say(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}", 1)
    )


def _context(folder: Path) -> ssl.SSLContext:
    """The name in the certificate is a component's, and not that of the address that is asked."""
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.check_hostname = False
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return context


def _secure(address: str, folder: Path) -> grpc.Channel:
    """What answers must have the name that our own certificate has: it is the same one."""
    import grpc
    from cryptography import x509

    ca, key, certificate = ((folder / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    name = names.value.get_values_for_type(x509.DNSName)[0]
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", name)])


def _say(words: str, status: int) -> int:
    print(words, file=sys.stderr)  # noqa: T201  # Docker keeps what a check prints
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
