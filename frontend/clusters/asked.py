"""What a request asks, as far as the choice of its cluster depends on it. The body itself goes on as it came.

Nothing is refused here: what is wrong with a request its cluster says, in the words in which it says it to everybody.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from frontend.prefix_names import NOTHING, PrefixNames, names_of
from slipstream.v1.inference_pb2 import GenerateRequest

_LONGEST_SESSION = 200


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        model: empty when it names none, or is not to be understood.
        streams: whether the answer shall come as events.
    """

    model: str = ""
    names: PrefixNames = NOTHING
    session: str = ""
    streams: bool = False


class _Body(msgspec.Struct):
    model: msgspec.Raw | UnsetType = UNSET
    messages: msgspec.Raw | UnsetType = UNSET
    prompt: msgspec.Raw | UnsetType = UNSET
    stream: msgspec.Raw | UnsetType = UNSET
    user: msgspec.Raw | UnsetType = UNSET


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_text = msgspec.json.Decoder(str).decode


def of_body(content: bytes, session: str) -> Asked:
    """Of an HTTP request's body.

    Args:
        session: by its header; empty without.
    """
    try:
        body = _decode_body(content)
    except msgspec.MsgspecError:
        return Asked(session=session)
    model = _text(body.model)
    prompt = body.messages if not isinstance(body.messages, UnsetType) else body.prompt
    # Without the last character, which closes the list or string: the next turn has something else there.
    names = NOTHING if isinstance(prompt, UnsetType) else names_of(model, memoryview(prompt)[:-1])
    streams = not isinstance(body.stream, UnsetType) and bytes(body.stream) == b"true"
    return Asked(model, names, session or _text(body.user)[:_LONGEST_SESSION], streams)


def of_call(request: GenerateRequest, session: str) -> Asked:
    """Of a gRPC call."""
    match request.WhichOneof("input"):
        case "text":
            prompt = request.text.encode()
        case "token_ids":
            prompt = request.token_ids.SerializeToString()[4:]  # without the length, which is not a beginning's
        case "chat":
            prompt = b"".join(f"{one.role}\0{one.content}\0".encode() for one in request.chat.messages)
        case _:
            return Asked(request.model, session=session, streams=True)
    return Asked(request.model, names_of(request.model, prompt), session, streams=True)


def _text(raw: msgspec.Raw | UnsetType) -> str:
    if isinstance(raw, UnsetType):
        return ""
    try:
        return _decode_text(raw)
    except msgspec.MsgspecError:
        return ""
