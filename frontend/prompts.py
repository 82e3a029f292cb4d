"""The three forms of a prompt, and the error when one is too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frontend.chat_template import ChatTemplate
from slipstream.errors import ContextLengthError, UnsupportedError


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to go on with; tokenized with the model's special tokens. `param` names the field it came in."""

    text: str
    param: str = "prompt"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    token_ids: Sequence[int]
    param: str = "prompt"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered with the model's template; each message has a `role` and a `content` text."""

    messages: Sequence[Mapping[str, str]]
    add_generation_prompt: bool = True
    param: str = "messages"

    def render(self, template: ChatTemplate | None) -> str:
        """The prompt's text.

        Raises:
            UnsupportedError: the model has no template.
            InvalidRequestError: the template refuses the messages.
        """
        if template is None:
            raise UnsupportedError(
                "This model has no chat template; use /v1/completions, or `text` over gRPC.", param=self.param
            )
        return template.render(self.messages, add_generation_prompt=self.add_generation_prompt)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


def context_length_error(prompt: Prompt, prompt_tokens: int, asked: int | None, limit: int) -> ContextLengthError:
    """In OpenAI's words, which clients are known to search."""
    where = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    if asked is None:
        need = f"your {where} resulted in {prompt_tokens} tokens and at least 1 is needed for the completion"
    else:
        need = (
            f"you requested {prompt_tokens + asked} tokens ({prompt_tokens} in the {where}, {asked} in the completion)"
        )
    remedy = f"Please reduce the length of the {where}" + ("." if asked is None else " or completion.")
    return ContextLengthError(
        f"This model's maximum context length is {limit} tokens. However, {need}. {remedy}", param=prompt.param
    )
