"""The sampling fields both faces share: their types, limits and names, and the wire form they become.

The HTTP request bodies inherit from `SamplingFields`; the gRPC face fills one from its message. So a limit is
written once and a wrong value is refused with the same words on either face.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from slipstream.errors import InvalidRequestError
from slipstream.v1.sampling_pb2 import SamplingParams

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LISTED_IDS = 1024
MAX_LOGPROBS = 20
_SHOWN_VALUE_CHARACTERS = 60
_SHOWN_ENTRIES = 16
_LONGEST_ID = 20

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Finite = Annotated[float, AllowInfNan(False)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


# Of lists: one mistake is told. A body of eight megabytes has room for millions, which took seconds and gigabytes.
FIRST_MISTAKE: Final = True


def _few(value: Any) -> Any:
    """Entries by token id, which is a text in JSON; counted first, since of a mapping every mistake is collected."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LISTED_IDS:
        limits = {"most": MAX_LISTED_IDS, "count": len(value)}
        raise PydanticCustomError("too_long", "there are {count} entries, at most {most} are allowed", limits)
    return {_as_id(key): bias for key, bias in value.items()}


def _as_id(key: Any) -> Any:
    numeric = isinstance(key, str) and len(key) <= _LONGEST_ID and key.isascii() and key.removeprefix("-").isdecimal()
    return int(key) if numeric else key


def _listed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not 1 <= len(value) <= MAX_STOP_CHARACTERS:  # said here, so that the path is not that of a list
        limits = {"longest": MAX_STOP_CHARACTERS}
        raise PydanticCustomError("stop_length", "string should have 1 to {longest} characters", limits)
    return [value]


_STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
    ]
}


class SamplingFields(BaseModel):
    """How tokens are chosen and when to stop. Absent and null both mean the model's neutral value."""

    # Strict: a bool is no number and a number in quotes is a mistake. Unknown fields are let be, as OpenAI does.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=2)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[
        Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MAX_LISTED_IDS)] | None,
        BeforeValidator(_few),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LISTED_IDS, fail_fast=FIRST_MISTAKE)] | None = None
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=FIRST_MISTAKE)] | None,
        BeforeValidator(_listed),
        WithJsonSchema(_STOP_SCHEMA),
    ] = None

    def to_params(self, *, logprobs: int | None) -> SamplingParams:
        """The wire form, stop strings included (the workers' form has none: see `frontend.inference`)."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            logit_bias=self.logit_bias or {},
            stop_token_ids=self.stop_token_ids or (),
            stop=self.stop or (),
        )


class _MessageFields(SamplingFields):
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


def checked_params(params: SamplingParams) -> SamplingParams:
    """A client's message held to the limits of `SamplingFields`.

    Raises:
        InvalidRequestError: a field is out of range; `param` names it.
    """
    values: dict[str, Any] = {}
    for field, value in params.ListFields():
        values[field.name] = dict(value) if isinstance(value, Mapping) else list(value) if field.is_repeated else value
    try:
        fields = _MessageFields.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error) from error
    return fields.to_params(logprobs=fields.logprobs)


def invalid_request(error: ValidationError) -> InvalidRequestError:
    """The first thing wrong with a request, in words for its sender; `param` is a dotted path."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"] if not _is_tag(part)) or None
    kind = first["type"]
    if kind == "json_invalid":
        reason = first["ctx"]["error"]
        return InvalidRequestError(f"The request body is not valid JSON: {reason}.", code="invalid_json")
    if kind == "missing":
        return InvalidRequestError(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    subject = f"'{param}'" if param else "request body"
    return InvalidRequestError(f"Invalid {subject}: {_reason(first)}.", param=param, code=code)


def _is_tag(part: int | str) -> bool:
    # "[key]" is pydantic's; the others name branches of our unions. No field of the API has a bracket.
    return isinstance(part, str) and part.startswith("[")


def _reason(details: ErrorDetails) -> str:
    value = details["input"]
    shown = f"{len(value)} entries" if isinstance(value, list | dict) and len(value) > _SHOWN_ENTRIES else repr(value)
    if len(shown) > _SHOWN_VALUE_CHARACTERS:
        shown = shown[:_SHOWN_VALUE_CHARACTERS] + "..."
    message = details["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}, got {shown}"
