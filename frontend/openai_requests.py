"""Bodies of the OpenAI-compatible endpoints: what is accepted, what is refused, and what it means to us.

Fields we don't know are let be, as the real service does. Fields we know but do not serve are refused: an
answer that silently ignored `tools` would be a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from frontend.cache_salt import LONGEST_SALT
from frontend.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from frontend.sampling_fields import FIRST_MISTAKE, MAX_LOGPROBS, SamplingFields, TokenId
from slipstream.errors import InvalidRequestError, UnsupportedError
from slipstream.v1.sampling_pb2 import SamplingParams

# Without `max_tokens`, /v1/completions gives this many: OpenAI's own default there.
COMPLETIONS_DEFAULT_MAX_TOKENS = 16
MAX_MESSAGES = 8192
MAX_PARTS = 1024
_STRICT = ConfigDict(strict=True, extra="ignore", frozen=True)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool | None = None


class Extension(BaseModel):
    """Slipstream's own field of a request (`extra_body={"slipstream": {...}}` in the openai client)."""

    model_config = _STRICT

    account: bool | None = Field(None, description="report which workers did what, and the KV blocks moved")


LONGEST_SESSION = 200
"""Characters of a user's name that tell sessions apart."""


class GenerationBody(SamplingFields):
    """What both endpoints accept."""

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    service_tier: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=LONGEST_SALT)] | None = Field(
        None, description="only requests with the same one share a prefix cache"
    )
    slipstream: Extension | None = None

    @property
    def session_of_user(self) -> str:
        """What keeps a user's requests together where no session is named."""
        return (self.user or "")[:LONGEST_SESSION]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def include_account(self) -> bool:
        return bool(self.slipstream and self.slipstream.account)

    def _check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")


class ContentPart(BaseModel):
    model_config = _STRICT

    type: str
    text: str | None = None


def _content_form(value: Any) -> str | None:
    return "[text]" if isinstance(value, str) else "[parts]" if isinstance(value, list) else None


class Message(BaseModel):
    model_config = _STRICT

    role: str
    content: (
        Annotated[
            Annotated[str, Tag("[text]")]
            | Annotated[list[ContentPart], Tag("[parts]"), Field(max_length=MAX_PARTS), FIRST_MISTAKE],
            Discriminator(
                _content_form,
                custom_error_type="content_type",
                custom_error_message="content should be a string or a list of parts",
            ),
        ]
        | None
    ) = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ResponseFormat(BaseModel):
    model_config = _STRICT

    type: str


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=FIRST_MISTAKE)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str], Field(fail_fast=FIRST_MISTAKE)] | None = None
    audio: Any = None
    web_search_options: Any = None

    def prompts(self) -> list[Prompt]:
        """The one conversation.

        Raises:
            InvalidRequestError: a field is refused.
        """
        self._check_stream_options()
        self._refuse_unsupported()
        messages = [_flat(message, f"messages.{place}") for place, message in enumerate(self.messages)]
        return [ChatPrompt(messages, add_generation_prompt=self.add_generation_prompt is not False)]

    def params(self) -> SamplingParams:
        """Sampling as it is on the wire.

        Raises:
            InvalidRequestError: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
        params = self.to_params(logprobs=(self.top_logprobs or 0) if self.logprobs else None)
        if self.max_completion_tokens is not None:  # the newer name of the two
            params.max_tokens = _bounded(self.max_completion_tokens)
        return params

    def _refuse_unsupported(self) -> None:
        for name in ("tools", "functions", "function_call", "audio", "web_search_options", "continue_final_message"):
            if getattr(self, name):
                _refuse(name)
        if self.tool_choice not in (None, "none", "auto"):
            _refuse("tool_choice")
        if self.response_format is not None and self.response_format.type != "text":
            _refuse("response_format", f"of type '{self.response_format.type}'")
        if self.modalities is not None and self.modalities != ["text"]:
            _refuse("modalities", "other than text")


def _prompt_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "[text]"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "[texts]" if isinstance(first, str) else "[batch]" if isinstance(first, list) else "[tokens]"


_Ids = Annotated[list[TokenId], Field(fail_fast=FIRST_MISTAKE)]


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("[text]")]
        | Annotated[list[str], Tag("[texts]"), Field(min_length=1, fail_fast=FIRST_MISTAKE)]
        | Annotated[list[TokenId], Tag("[tokens]"), Field(min_length=1, fail_fast=FIRST_MISTAKE)]
        | Annotated[
            list[Annotated[list[TokenId], Field(fail_fast=FIRST_MISTAKE)]],
            Tag("[batch]"),
            Field(min_length=1, fail_fast=FIRST_MISTAKE),
        ],
        Discriminator(
            _prompt_form,
            custom_error_type="prompt_type",
            custom_error_message="prompt should be a string, a list of strings, a list of token ids or a list of those",
        ),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None

    def prompts(self) -> list[Prompt]:
        """Every prompt, in order.

        Raises:
            InvalidRequestError: a field is refused.
        """
        self._check_stream_options()
        for name in ("echo", "suffix"):
            if getattr(self, name):
                _refuse(name)
        if self.best_of is not None and self.best_of > 1:
            _refuse("best_of", "above 1")
        return [_prompt(form) for form in self._forms()]

    def params(self) -> SamplingParams:
        """Sampling as it is on the wire."""
        return self.to_params(logprobs=self.logprobs)

    def _forms(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        form = _prompt_form(self.prompt)
        return [self.prompt] if form == "[tokens]" else self.prompt  # type: ignore[list-item, return-value]


def _prompt(form: str | list[int]) -> Prompt:
    return TextPrompt(form) if isinstance(form, str) else TokenPrompt(form)


def _flat(message: Message, path: str) -> dict[str, str]:
    """A message as templates take it: one text. Text parts are joined by line breaks, as vLLM does."""
    if message.tool_calls:
        _refuse(f"{path}.tool_calls")
    if message.function_call:
        _refuse(f"{path}.function_call")
    if message.role in ("tool", "function"):
        _refuse(f"{path}.role", f"'{message.role}'")
    if message.role not in _ROLES:
        raise InvalidRequestError(
            f"Invalid '{path}.role': '{message.role}' is none of {', '.join(_ROLES)}.", param=f"{path}.role"
        )
    if message.content is None and message.role != "assistant":
        raise InvalidRequestError(
            f"Missing required parameter: '{path}.content'.", param=f"{path}.content", code="missing_required_parameter"
        )
    flat = {"role": _ROLES[message.role], "content": _text(message.content, path)}
    return flat if message.name is None else flat | {"name": message.name}


def _text(content: str | list[ContentPart] | None, path: str) -> str:
    if not isinstance(content, list):
        return content or ""
    for place, part in enumerate(content):
        if part.type != "text":
            _refuse(f"{path}.content.{place}.type", f"'{part.type}'")
        if part.text is None:
            param = f"{path}.content.{place}.text"
            raise InvalidRequestError(
                f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
    return "\n".join(part.text for part in content if part.text is not None)


def _bounded(tokens: int) -> int:
    """Into the wire's 32 bits; anything near that is too long for every model and refused as such."""
    return min(tokens, 2**31 - 1)


def _refuse(param: str, detail: str = "") -> NoReturn:
    subject = f"'{param}' {detail}".strip()
    raise UnsupportedError(f"{subject} is not supported by Slipstream; leave it out.", param=param)
