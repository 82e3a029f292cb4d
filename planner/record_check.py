"""What a worker's record must look like before the registry believes it.

Everything in a record is shown to other processes, dialled by them or printed for people, so that sizes and
shapes are bounded here, once, at the border.
"""

from __future__ import annotations

import re

from slipstream.errors import InvalidRequestError
from slipstream.record_limits import MAX_PATH_NAME_CHARS, MAX_PATH_TEXT_CHARS, MAX_PATHS_BYTES, MAX_RECORD_BYTES
from slipstream.v1.registry_pb2 import (
    Health,
    Role,
    Startup,
    TransferEndpoint,
    TransferPath,
    WorkerRecord,
    WorkerState,
)

MAX_MODEL_CHARS = 256
MAX_URL_CHARS = 512
MAX_HOST_ID_CHARS = 256
MAX_NODE_CHARS = 253

MAX_TRANSPORTS = 8
MAX_RANKS = 64
PUBLIC_KEY_BYTES = 32
MAX_STARTUP_S = 7 * 86400.0
MAX_HEALTH_REASONS, MAX_HEALTH_DEVICES, MAX_HEALTH_CHARS = 16, 64, 240

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")
_DEVICE = re.compile(r"[a-z0-9:_-]{0,32}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9]{1,16})?\]")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def check_record(record: WorkerRecord) -> None:
    """Refuse a record that is too large, incomplete or misshapen.

    Raises:
        InvalidRequestError: names the field, what it held and what it may hold.
    """
    size_bytes = record.ByteSize()
    if size_bytes > MAX_RECORD_BYTES:
        raise _wrong("worker", f"a record of {size_bytes} bytes", f"at most {MAX_RECORD_BYTES} bytes")
    check_worker_id(record.worker_id)
    if record.role not in (Role.ROLE_PREFILL, Role.ROLE_DECODE):
        raise _wrong("role", record.role, "ROLE_PREFILL or ROLE_DECODE")
    if record.state not in (WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING, WorkerState.FENCED):
        raise _wrong("state", record.state, "STARTING, READY, DRAINING or FENCED")
    _check_text("model", record.model, MAX_MODEL_CHARS, required=True)
    _check_address("address", record.address)
    _check_text("host_id", record.host_id, MAX_HOST_ID_CHARS)
    _check_text("metrics_url", record.metrics_url, MAX_URL_CHARS)
    if record.metrics_url and not record.metrics_url.startswith(("http://", "https://")):
        raise _wrong("metrics_url", record.metrics_url, "an http:// or https:// address, or nothing")
    if not _DEVICE.fullmatch(record.device):
        raise _wrong("device", record.device, "a name like cpu or cuda:0")
    if record.epoch < 1:
        raise _wrong("epoch", record.epoch, "a number that grows with each start, from 1")
    _check_text("node", record.node, MAX_NODE_CHARS)
    _check_startup(record.startup)
    if record.HasField("health"):
        _check_health(record.health)
    if record.HasField("transfer"):
        _check_endpoint(record.transfer)
    for path in record.paths:
        _check_path(path)
    paths_bytes = sum(path.ByteSize() for path in record.paths)
    if paths_bytes > MAX_PATHS_BYTES:
        raise _wrong("paths", f"{len(record.paths)} of {paths_bytes} bytes", f"at most {MAX_PATHS_BYTES} bytes")


def _check_startup(startup: Startup) -> None:
    for phase, seconds in startup.ListFields():
        if not 0.0 <= seconds <= MAX_STARTUP_S:
            raise _wrong(f"startup.{phase.name}", seconds, f"0 to {MAX_STARTUP_S:g}")


def _check_health(health: Health) -> None:
    if len(health.reasons) > MAX_HEALTH_REASONS or len(health.device_ids) > MAX_HEALTH_DEVICES:
        shown = f"{len(health.reasons)} reasons and {len(health.device_ids)} device_ids"
        raise _wrong("health", shown, f"at most {MAX_HEALTH_REASONS} and {MAX_HEALTH_DEVICES}")
    _check_text("health.fenced_because", health.fenced_because, MAX_HEALTH_CHARS)
    for reason in health.reasons:
        _check_text("health.reasons.code", reason.code, MAX_PATH_NAME_CHARS, required=True)
        _check_text("health.reasons.text", reason.text, MAX_HEALTH_CHARS)
    for device_id in health.device_ids:
        _check_text("health.device_ids", device_id, MAX_PATH_NAME_CHARS)


def _check_endpoint(endpoint: TransferEndpoint) -> None:
    _check_address("transfer.address", endpoint.address)
    if len(endpoint.transports) > MAX_TRANSPORTS:
        raise _wrong("transfer.transports", f"{len(endpoint.transports)} names", f"at most {MAX_TRANSPORTS}")
    if len(endpoint.public_key) not in (0, PUBLIC_KEY_BYTES):
        raise _wrong("transfer.public_key", f"{len(endpoint.public_key)} bytes", f"{PUBLIC_KEY_BYTES} bytes")
    for name in endpoint.transports:
        _check_text("transfer.transports", name, MAX_PATH_NAME_CHARS, required=True)
    if len(endpoint.ranks) > MAX_RANKS or (endpoint.ranks and endpoint.ranks[0] != endpoint.address):
        shown = f"{len(endpoint.ranks)} addresses, the first {list(endpoint.ranks[:1])}"
        raise _wrong("transfer.ranks", shown, f"at most {MAX_RANKS}, the first one transfer.address")
    for address in endpoint.ranks:
        _check_address("transfer.ranks", address)


def _check_path(path: TransferPath) -> None:
    if not _WORKER_ID.fullmatch(path.peer_worker_id):
        raise _wrong("paths.peer_worker_id", path.peer_worker_id, "a worker's id")
    _check_text("paths.transport", path.transport, MAX_PATH_NAME_CHARS)
    _check_text("paths.detail", path.detail, MAX_PATH_NAME_CHARS)
    _check_text("paths.warning", path.warning, MAX_PATH_TEXT_CHARS)
    _check_text("paths.error", path.error, MAX_PATH_TEXT_CHARS)


def check_worker_id(worker_id: str) -> None:
    """Refuse a name that could not be shown in a log line or a metric's label.

    Raises:
        InvalidRequestError
    """
    if not _WORKER_ID.fullmatch(worker_id):
        raise _wrong("worker_id", worker_id, "1 to 128 letters, digits and ._:@+- that begin with a letter or digit")


def _check_text(field: str, value: str, max_chars: int, *, required: bool = False) -> None:
    if required and not value:
        raise _wrong(field, value, "a name")
    if len(value) > max_chars or not value.isprintable():
        raise _wrong(field, value, f"at most {max_chars} printable characters")


def _check_address(field: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not (_HOST.fullmatch(host) and _PORT.fullmatch(port) and int(port) <= 65535):
        raise _wrong(field, address, "host:port, as other processes reach it, with a port from 1 to 65535")


def _wrong(field: str, value: object, expected: str) -> InvalidRequestError:
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:80]}... ({len(shown)} characters)"
    return InvalidRequestError(f"worker record: {field} is {shown}, expected {expected}", param=field)
