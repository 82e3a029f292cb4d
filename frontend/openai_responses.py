"""Bodies of the OpenAI-compatible answers, field for field as the real service writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from google.protobuf.json_format import MessageToDict
from msgspec import UNSET, UnsetType

from frontend.answer_text import PlacedToken
from frontend.inference import Answer
from frontend.tokenizer import TextModel
from slipstream.errors import SlipstreamError
from slipstream.v1.sampling_pb2 import Candidate, FinishReason, RequestAccount

# JSON has no infinity; OpenAI writes this for what the model holds impossible.
_LEAST_LOGPROB = -9999.0

FinishName = Literal["stop", "length"]
_FINISH_NAMES: dict[FinishReason.ValueType, FinishName] = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
}


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatMessage(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName


class ChatDelta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName | None = None


class CompletionChoice(msgspec.Struct):
    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishName | None = None


class SlipstreamAccount(msgspec.Struct):
    """Slipstream's own field: the first answer's account, and every answer's where there are several."""

    account: dict[str, Any] | None
    accounts: list[dict[str, Any] | None] | UnsetType = UNSET


class _Body(msgspec.Struct, kw_only=True):
    id: str
    object: str
    created: int
    model: str


class ChatCompletion(_Body, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage
    slipstream: SlipstreamAccount | UnsetType = UNSET


class ChatCompletionChunk(_Body, kw_only=True):
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    slipstream: SlipstreamAccount | UnsetType = UNSET


class Completion(_Body, kw_only=True):
    """Both the whole answer and a chunk of a streamed one: the API has one shape for the two."""

    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    slipstream: SlipstreamAccount | UnsetType = UNSET


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "slipstream"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class ErrorDetails(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetails


def error_body(error: SlipstreamError) -> bytes:
    """The one shape of every error."""
    return msgspec.json.encode(ErrorBody(ErrorDetails(error.message, error.openai_type, error.param, error.code)))


def finish_name(reason: FinishReason.ValueType) -> FinishName | None:
    return _FINISH_NAMES.get(reason)


def usage_of(answer: Answer) -> Usage:
    usage = answer.usage
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        PromptTokensDetails(usage.cached_tokens),
    )


def account_of(answer: Answer) -> SlipstreamAccount:
    """What the answers cost and where; null for one that a stop string ended before its worker reported."""
    each = [_plain(answer.accounts.get(index)) for index in range(answer.size)]
    return SlipstreamAccount(each[0], each if len(each) > 1 else UNSET)


def _plain(account: RequestAccount | None) -> dict[str, Any] | None:
    if account is None:
        return None
    fields: dict[str, Any] = MessageToDict(
        account, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # protobuf's JSON form writes 64-bit integers as strings; counts of bytes fit every JSON reader's number.
    return fields | {"kv_bytes_moved": account.kv_bytes_moved, "kv_wire_bytes": account.kv_wire_bytes}


def chat_logprobs(tokens: Sequence[PlacedToken], text_model: TextModel) -> ChatLogprobs:
    content = []
    for token in tokens:
        if token.logprobs is None:
            continue
        chosen = _top(token.logprobs.chosen, text_model)
        top = [_top(candidate, text_model) for candidate in token.logprobs.top]
        content.append(TokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def completion_logprobs(tokens: Sequence[PlacedToken], text_model: TextModel) -> CompletionLogprobs:
    found = CompletionLogprobs([], [], [], [])
    for token in tokens:
        if token.logprobs is None:
            continue
        name = _completion_name(token.logprobs.chosen, text_model)
        logprob = _finite(token.logprobs.chosen.logprob)
        found.tokens.append(name)
        found.token_logprobs.append(logprob)
        # The sampled token is always among them, so there may be one more than asked for.
        top = {_completion_name(other, text_model): _finite(other.logprob) for other in token.logprobs.top}
        found.top_logprobs.append(top | {name: logprob})
        found.text_offset.append(token.text_offset)
    return found


def _top(candidate: Candidate, text_model: TextModel) -> TopLogprob:
    raw = text_model.token_bytes(candidate.token_id)
    return TopLogprob(_readable(raw, prefix=""), _finite(candidate.logprob), list(raw))


def _completion_name(candidate: Candidate, text_model: TextModel) -> str:
    return _readable(text_model.token_bytes(candidate.token_id), prefix="bytes:")


def _readable(raw: bytes, *, prefix: str) -> str:
    """A token's text, or, when it is only a part of a character, its bytes spelled out as OpenAI spells them."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB


def response_schemas() -> dict[str, Any]:
    """JSON schemas of all bodies above, for the OpenAPI document."""
    kinds = [ChatCompletion, ChatCompletionChunk, Completion, ModelCard, ModelList, ErrorBody]
    _refs, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    plain: dict[str, Any] = json.loads(msgspec.json.encode(components))
    return plain
