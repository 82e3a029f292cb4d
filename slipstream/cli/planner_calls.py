"""Calls of the planner's gRPC service, as commands make them: each with a deadline, each failure with a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from slipstream.errors import ConfigError, DeadlineError, UnavailableError, WorkerLostError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from slipstream.v1.planner_pb2_grpc import PlannerStub

T = TypeVar("T", bound="Message")

TIMEOUT_S = 10.0
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def ask_planner(address: str, call: Callable[[PlannerStub], Any], kind: type[T]) -> T:
    """What the planner at an address answers.

    Args:
        call: makes the call, with `timeout=TIMEOUT_S`.

    Raises:
        UnavailableError: no control plane answers there. DeadlineError: it is silent. Others as it tells them.
    """
    import grpc

    from slipstream.grpc_channels import client_options
    from slipstream.grpc_errors import from_rpc_error
    from slipstream.security.channels import open_blocking_channel
    from slipstream.security.diagnosis import why_unreachable
    from slipstream.security.names import ComponentRole
    from slipstream.v1.planner_pb2_grpc import PlannerStub

    with open_blocking_channel(address, peer=ComponentRole.CONTROL_PLANE, options=client_options()) as channel:
        try:
            answer = call(PlannerStub(channel))
        except grpc.RpcError as error:
            known = from_rpc_error(error)
            if isinstance(known, DeadlineError):
                raise DeadlineError(f"the control plane at {address} did not answer within {TIMEOUT_S:g} s") from None
            if isinstance(known, WorkerLostError):  # what a broken connection is taken for, and nothing else here
                reason = why_unreachable(address, ComponentRole.CONTROL_PLANE)
                remedy = (
                    "; start one with `slipstream planner serve`, or say where it is with --control-plane HOST:PORT"
                )
                raise UnavailableError(
                    f"no control plane answers at {address} ({known.message}){reason or remedy}"
                ) from None
            raise known from None
    assert isinstance(answer, kind)
    return answer


def moment(text: str, now_unix_s: float, flag: str) -> float:
    """`90s`, `10m`, `2h` and `1d` ago, or a time such as `2026-05-01T14:30` (UTC unless it says otherwise).

    Raises:
        ConfigError: neither.
    """
    ago = _AGO.fullmatch(text.strip())
    if ago is not None:
        return now_unix_s - float(ago[1]) * _UNIT_S[ago[2]]
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f"{flag} = {text} is neither a time ago such as 10m or 2h, nor a time such as 2026-05-01T14:30"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def clock(unix_s: float) -> str:
    """`2026-05-01 14:30:05` in UTC."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def as_json(message: Message) -> str:
    """With the names of the .proto file."""
    import json

    from google.protobuf.json_format import MessageToDict

    plain = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(plain, indent=2)
