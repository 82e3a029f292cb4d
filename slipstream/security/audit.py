"""The audit log: who changed what about the cluster, and whether it was let.

One JSON line for each administrative call that reached a server, and for each change of API keys: time, action, who
(the name in its certificate, and its address), with what, and how it ended. Lines go to `log.audit_log`, or among the
other log lines where there is none. Requests for text are in the access log, not here.

A file is opened for each line: lines are rare, and a file that was moved away or removed is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import msgspec
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from slipstream import telemetry
from slipstream.errors import StartupError
from slipstream.security.guard import peer_name

if TYPE_CHECKING:  # these take parameters for the type checker alone
    Handler = grpc.RpcMethodHandler[Any, Any]
    Details = grpc.HandlerCallDetails
    Context = grpc.aio.ServicerContext[Any, Any]

log = telemetry.get_logger(__name__)

ACTIONS = frozenset(
    f"/slipstream.v1.{call}"
    for call in (
        "Planner/Apply",
        "Scaler/StartWorker",
        "Scaler/DrainWorker",
        "Scaler/ReportSick",
        "Worker/SetRole",
        "Worker/SetFence",
        "Registry/Deregister",
    )
)
"""Calls that change the cluster. Registering is no act of anybody: workers repeat it every few seconds."""

LONGEST_VALUE = 4096
"""Characters of one argument; a policy has some hundreds."""


class Line(msgspec.Struct, omit_defaults=True):
    """One act.

    Attributes:
        who: the name in the certificate, where there is one.
        peer: its address, as gRPC writes it; `local` for a command on this machine.
        outcome: `done`, or gRPC's name of the refusal.
    """

    time: str
    component: str
    action: str
    peer: str
    outcome: str
    who: str = ""
    arguments: Mapping[str, Any] = {}
    reason: str = ""


@dataclass(slots=True)
class _Sink:
    component: str = ""
    path: Path | None = None


_sink = _Sink()


def configure(path: Path | None, component: str) -> None:
    """Where this process writes, from now on.

    Raises:
        StartupError: it cannot write there.
    """
    _sink.component, _sink.path = component, path
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(_open(path))
    except OSError as error:
        raise StartupError(f"log.audit_log: {path} cannot be written ({error.strerror})") from None


def record(
    action: str,
    outcome: str,
    *,
    peer: str = "local",
    who: str = "",
    reason: str = "",
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write an act down. What cannot be written goes to the other log lines: an act is never lost without a word."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    bounded = {name: _bounded(value) for name, value in (arguments or {}).items()}
    line = Line(now, _sink.component, action, peer, outcome, who, bounded, reason[:LONGEST_VALUE])
    if _sink.path is not None:
        content = msgspec.json.encode(line) + b"\n"
        try:
            _append(_sink.path, content)
            return
        except OSError as error:
            log.error("audit_log_failed", path=str(_sink.path), reason=error.strerror)
    log.info("audit", **{name: value for name, value in msgspec.to_builtins(line).items() if name != "time"})


class Audit(grpc.aio.ServerInterceptor):
    """Writes down each call of `ACTIONS`, also those that are refused: put it before what refuses."""

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler | None]], handler_call_details: Details
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in ACTIONS:
            return handler
        action = handler_call_details.method.removeprefix("/slipstream.v1.")
        inner: Any = handler.unary_unary
        assert inner is not None, f"{action} is a stream"

        async def audited(request: Message, context: Context) -> Any:
            readable = isinstance(request, Message)  # else it is refused, further in
            arguments = MessageToDict(request, preserving_proto_field_name=True) if readable else {}
            try:
                reply = await inner(request, context)
            except BaseException as error:
                outcome, reason = _ended(context, error)
                record(action, outcome, peer=context.peer(), who=_who(context), reason=reason, arguments=arguments)
                raise
            record(action, "done", peer=context.peer(), who=_who(context), arguments=arguments)
            return reply

        return grpc.unary_unary_rpc_method_handler(audited, handler.request_deserializer, handler.response_serializer)


def _ended(context: Context, error: BaseException) -> tuple[str, str]:
    code: Any = context.code()  # the stubs promise a number
    name = code.name if isinstance(code, grpc.StatusCode) else ""
    return name.lower() or type(error).__name__, str(context.details() or "")


def _who(context: Context) -> str:
    name = peer_name(context)
    return "" if name is None else name.uri


def _bounded(value: Any) -> Any:
    text = value if isinstance(value, str) else None
    if text is None or len(text) <= LONGEST_VALUE:
        return value
    return f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _append(path: Path, content: bytes) -> None:
    file = _open(path)
    try:
        os.write(file, content)  # in one piece: others write to it too
    finally:
        os.close(file)
