"""Seeded bad input: bodies, bytes and messages that no honest client sends, and some that are merely unusual.

The fields are read from the models of the requests, so that a new one is tried without a word here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

from frontend.openai_requests import ChatBody, CompletionBody
from slipstream.v1 import inference_pb2
from slipstream.v1.sampling_pb2 import SamplingParams

FIELDS: Final = {
    "/v1/chat/completions": sorted(ChatBody.model_fields),
    "/v1/completions": sorted(CompletionBody.model_fields),
}
_DEEP = 2000

_NUMBERS: Final[tuple[Any, ...]] = (
    *(0, -0.0, 1, -1, 2, 20, 21, 0.5, 1.5, 1e-320, 5e-324, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400, 511, 512, 50_000_000),
)
_TEXTS: Final = (
    *("", " ", "\0", "\n", "a", "text", "true", "1", "</s>", "<|im_start|>", "<|im_end|>", "{{ 7*7 }}", "{% raw %}"),
    *(
        "\ud800",
        "\udfff\ud800",
        "\u202e\u0000\ufeff",
        "🙂" * 40,
        "e\u0301" * 40,
        "x" * 1025,
        "y" * 70_000,
        "../../etc/passwd",
    ),
    *("' OR 1=1 --", "$(reboot)", "\r\nX-Injected: 1", "%00%0d%0a"),
)


def value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value; numbers and texts from the edges."""
    kind = chance.randrange(9 if depth < 3 else 5)
    if kind == 0:
        return chance.choice((None, True, False))
    if kind in (1, 2):
        return chance.choice(_NUMBERS)
    if kind in (3, 4):
        return chance.choice(_TEXTS)
    if kind == 5:
        return [value(chance, depth + 1) for _ in range(chance.choice((0, 1, 2, 17, 300)))]
    if kind == 6:
        return {str(chance.choice(_TEXTS)): value(chance, depth + 1) for _ in range(chance.randrange(4))}
    if kind == 7:
        return [chance.choice(_NUMBERS)] * chance.choice((1, 16, 1025))
    return {str(chance.choice((0, 1, 511, 512, 2**31, -1, "x"))): chance.choice(_NUMBERS)}


def body(chance: random.Random, model: str) -> tuple[str, bytes]:
    """A path and a JSON body with one to three fields gone mad."""
    path = chance.choice(sorted(FIELDS))
    fields: dict[str, Any] = {"model": model, "max_tokens": 4}
    fields |= {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hello"}]}
    for name in chance.sample(FIELDS[path], chance.randint(1, 3)):
        fields[name] = value(chance)
    if fields["max_tokens"] is None:
        fields["max_tokens"] = 4  # as long as the context allows is honest, and takes too long
    return path, json.dumps(fields).encode("utf-8", "surrogatepass")


def broken_body(chance: random.Random, model: str) -> tuple[str, bytes]:
    """A path and bytes that are no JSON, or JSON of a kind that breaks parsers."""
    path, whole = body(chance, model)
    made: Callable[[], bytes] = chance.choice(
        (
            lambda: whole[: chance.randrange(len(whole))],
            lambda: b"[" * _DEEP,
            lambda: b'{"a":' * _DEEP,
            lambda: b'{"model":"%s","prompt":%s1%s}' % (model.encode(), b"[" * _DEEP, b"]" * _DEEP),
            lambda: whole[:-1] + b',"model":"nobody","model":5,"stream":1}',
            lambda: b"\xff\xfe" + whole,
            lambda: whole.replace(b"hello", b"\xc3\x28\xf0\x9f"),
            lambda: chance.randbytes(200),
            lambda: b"",
            lambda: b'{"model":"%s","prompt":"x","max_tokens":%s}' % (model.encode(), b"9" * 5000),
            lambda: b'{"model":"%s","prompt":[%s]}' % (model.encode(), b'"a",1,' * 20_000 + b"1"),
        )
    )
    return path, made()


def head(chance: random.Random) -> bytes:
    """Bytes for a socket where a request's head belongs; mostly not one."""
    line = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    made: Callable[[], bytes] = chance.choice(
        (
            lambda: chance.randbytes(chance.randint(1, 4000)),
            lambda: b"GET /health/live HTTP/9.9\r\n\r\n",
            lambda: b"GET http://[::1/health/live HTTP/1.1\r\nHost: [\r\n\r\n",
            lambda: b"GET /v1/\x00\xff HTTP/1.1\r\nHost: x\r\n\r\n",
            lambda: b"GET /nobody HTTP/1.1\r\nHost: [::1\r\nConnection: close\r\n\r\n",
            lambda: line + b"X: " + b"a" * 300_000 + b"\r\n\r\n",
            lambda: line + b"X: a\r\n" * 3000 + b"\r\n",
            lambda: line + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            lambda: line + b"Content-Length: -1\r\n\r\n",
            lambda: line + b"Content-Length: 1, 2\r\n\r\n{}",
            lambda: line + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}",
            lambda: line + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}",
            lambda: line + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            lambda: line + b"Transfer-Encoding: xchunked\r\n\r\n{}",
            lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            lambda: b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
            lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(400),
        )
    )
    return made()


def call(chance: random.Random, model: str) -> inference_pb2.GenerateRequest:
    """A gRPC request with some fields gone mad."""
    request = inference_pb2.GenerateRequest(model=model, text="hello", sampling=SamplingParams(max_tokens=4))
    for field in chance.sample([*SamplingParams.DESCRIPTOR.fields], chance.randint(1, 3)):
        _set_mad(chance, request.sampling, field.name)
    match chance.randrange(6):
        case 0:
            request.token_ids.ids.extend(chance.choices((0, 5, 511, 512, 2**32 - 1), k=chance.choice((0, 1, 9000))))
        case 1:
            request.chat.messages.add(role=_text(chance), content=_text(chance))
        case 2:
            request.ClearField("input")
        case 3:
            request.request_id, request.model = _text(chance), chance.choice((model, _text(chance)))
    return request


def wire(chance: random.Random, model: str) -> bytes:
    """The bytes of a gRPC request, cut, doubled, filled with unknown fields, or no message at all."""
    whole = call(chance, model).SerializeToString()
    made: Callable[[], bytes] = chance.choice(
        (
            lambda: whole[: chance.randrange(len(whole))],
            lambda: whole + whole,
            lambda: whole + b"\xfa\x7f\x05hello",
            lambda: b"\x12\x02\xc3\x28",
            lambda: chance.randbytes(chance.randint(1, 300)),
            lambda: b"\x1b" * 150,
        )
    )
    return made()


def _text(chance: random.Random) -> str:
    """That fits into a message: no lone surrogates."""
    return chance.choice(_TEXTS).encode("utf-8", "replace").decode()


def _set_mad(chance: random.Random, params: SamplingParams, name: str) -> None:
    if name == "stop":
        params.stop.extend(_text(chance) for _ in range(chance.choice((1, 17))))
    elif name == "stop_token_ids":
        params.stop_token_ids.extend([chance.choice((0, 511, 512, 2**32 - 1))] * chance.choice((1, 1025)))
    elif name == "logit_bias":
        params.logit_bias[chance.choice((0, 511, 512, 2**32 - 1))] = float(chance.choice((0, 100, 1e308, float("nan"))))
    else:
        for _ in range(20):
            try:
                setattr(params, name, chance.choice(_NUMBERS))
            except (TypeError, ValueError, OverflowError):
                continue  # no value of this field; another one
            return
