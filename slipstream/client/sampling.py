"""From keywords to a `GenerateRequest`: names are checked here, limits by the cluster."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypedDict

from slipstream.errors import InvalidRequestError
from slipstream.v1 import inference_pb2, sampling_pb2


class SamplingOptions(TypedDict, total=False):
    """Keywords of `generate`, `chat` and `complete`. None, or leaving one out, takes the neutral value."""

    max_tokens: int | None  # tokens to generate; up to the context length when absent
    min_tokens: int | None  # no end before this many
    temperature: float | None  # 0 is greedy; 1 when absent
    top_p: float | None  # (0, 1]
    top_k: int | None  # -1 or 0 is off
    min_p: float | None  # [0, 1]
    seed: int | None  # the same seed gives the same answer
    presence_penalty: float | None  # [-2, 2]
    frequency_penalty: float | None  # [-2, 2]
    repetition_penalty: float | None  # (0, 2]
    logprobs: int | None  # alternatives to report for each token; 0: only the chosen one
    ignore_eos: bool | None  # go on past the model's end-of-sequence token
    logit_bias: Mapping[int, float] | None  # token id -> [-100, 100]
    stop_token_ids: Sequence[int] | None  # end after one of these
    stop: str | Sequence[str] | None  # end before one of these strings


class ChatMessage(TypedDict):
    """One message of a conversation. Roles are those of the model's chat template, mostly system, user, assistant."""

    role: str
    content: str


def text_request(
    prompt: str | Sequence[int], model: str, request_id: str, options: Mapping[str, object]
) -> inference_pb2.GenerateRequest:
    """A request to continue `prompt`: text, or token ids that are used as they are.

    Raises:
        InvalidRequestError: an unknown name, or a value of the wrong type or beyond what the field holds.
    """
    request = _request(model, request_id, options)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        try:
            request.token_ids.ids.extend(prompt)
        except (TypeError, ValueError) as error:
            message = f"prompt must be text or a sequence of token ids: {error}"
            raise InvalidRequestError(message, param="prompt") from None
        request.token_ids.SetInParent()
    return request


def chat_request(
    messages: Sequence[ChatMessage], model: str, request_id: str, options: Mapping[str, object]
) -> inference_pb2.GenerateRequest:
    """A request to answer a conversation. Raises InvalidRequestError as `text_request` does."""
    request = _request(model, request_id, options)
    request.chat.SetInParent()
    for index, message in enumerate(messages):
        try:
            request.chat.messages.add(role=message["role"], content=message["content"])
        except (KeyError, TypeError) as error:
            name = f"messages[{index}]"
            raise InvalidRequestError(f"{name} must have a text `role` and `content`: {error}", param=name) from None
    return request


def _request(model: str, request_id: str, options: Mapping[str, object]) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(model=model, request_id=request_id, sampling=_sampling(options))


def _sampling(options: Mapping[str, object]) -> sampling_pb2.SamplingParams:
    known = SamplingOptions.__annotations__
    message = sampling_pb2.SamplingParams()
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
            raise InvalidRequestError(f"{name} is not a sampling parameter{hint}", param=name)
        if value is not None:
            _set(message, name, value)
    return message


def _set(message: sampling_pb2.SamplingParams, name: str, value: object) -> None:
    one_stop_string = name == "stop" and isinstance(value, str)
    try:
        # The constructor takes every kind of field, repeated ones and maps included; assignment does not.
        message.MergeFrom(sampling_pb2.SamplingParams(**{name: [value] if one_stop_string else value}))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequestError(f"{name} = {value!r} is not a valid value: {error}", param=name) from None
