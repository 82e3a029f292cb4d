"""From the pieces of an answer to OpenAI's objects: chunks as they come, or one whole at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from frontend import openai_responses as shapes
from frontend.answer_text import PlacedToken
from frontend.http_exchange import sse_events
from frontend.inference import Answer, AnswerDelta
from frontend.tokenizer import TextModel

_encode_text = msgspec.json.Encoder().encode
_MARK = "text stands here"
_ENCODED_MARK = _encode_text(_MARK)


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats.

    Attributes:
        created: seconds since the epoch.
    """

    request_id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the client wants to see beside the text."""

    logprobs: bool
    usage_chunk: bool
    account: bool


class Writer(Protocol):
    """One endpoint's shapes. One object an answer."""

    def events(self, delta: AnswerDelta, answer: Answer) -> bytes:
        """What to stream for this delta; often one event, sometimes none."""
        ...

    def last_chunks(self, answer: Answer) -> Iterator[msgspec.Struct]:
        """What follows once every answer is finished."""
        ...

    def whole(self, answer: Answer, collected: list[Collected]) -> msgspec.Struct:
        """The unstreamed form."""
        ...


@dataclass(slots=True)
class Collected:
    """One finished answer."""

    finish_reason: shapes.FinishName = "stop"
    texts: list[str] = field(default_factory=list)
    tokens: list[PlacedToken] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


async def collect(answer: Answer) -> list[Collected]:
    """Read an answer to its end."""
    collected = [Collected() for _ in range(answer.size)]
    async for delta in answer:
        own = collected[delta.index]
        own.texts.append(delta.piece.text)
        own.tokens.extend(delta.piece.shown)
        own.finish_reason = shapes.finish_name(delta.piece.finish_reason) or own.finish_reason
    return collected


class _Base:
    def __init__(self, head: Head, wishes: Wishes, text_model: TextModel) -> None:
        self._head = head
        self._wishes = wishes
        self._text_model = text_model
        self._unfinished: set[int] | None = None
        self._around_text: dict[int, tuple[bytes, bytes]] = {}

    def events(self, delta: AnswerDelta, answer: Answer) -> bytes:
        """See `Writer`. Of events that say nothing but text, all but the text is encoded once."""
        if not self._is_plain(delta):
            return sse_events(list(self.chunks(delta, answer)))
        around = self._around_text.get(delta.index)
        if around is None:
            # The text is the last of what is not ours.
            before, _mark, after = sse_events([self._plain(delta.index, _MARK)]).rpartition(_ENCODED_MARK)
            around = self._around_text[delta.index] = before, after
        return around[0] + _encode_text(delta.piece.text) + around[1]

    def chunks(self, delta: AnswerDelta, answer: Answer) -> Iterator[msgspec.Struct]:
        """The objects of a delta."""
        raise NotImplementedError

    def _plain(self, index: int, text: str) -> msgspec.Struct:
        """The object that says nothing but text."""
        raise NotImplementedError

    def _is_plain(self, delta: AnswerDelta) -> bool:
        """Whether it is the only one of this delta."""
        piece = delta.piece
        return bool(piece.text) and not piece.finish_reason and not self._wishes.logprobs

    def _usage_field(self) -> UnsetType | None:
        # With include_usage every chunk has the field, null until the last; without it none has.
        return None if self._wishes.usage_chunk else UNSET

    def _closing_account(self, delta: AnswerDelta, answer: Answer) -> shapes.SlipstreamAccount | UnsetType:
        """On the finish of the last answer, unless a usage chunk follows that will carry it."""
        if self._unfinished is None:
            self._unfinished = set(range(answer.size))
        self._unfinished.discard(delta.index)
        if self._unfinished or self._wishes.usage_chunk:
            return UNSET
        return self._account(answer)

    def _account(self, answer: Answer) -> shapes.SlipstreamAccount | UnsetType:
        return shapes.account_of(answer) if self._wishes.account else UNSET


class ChatWriter(_Base):
    """/v1/chat/completions."""

    def __init__(self, head: Head, wishes: Wishes, text_model: TextModel) -> None:
        super().__init__(head, wishes, text_model)
        self._id = f"chatcmpl-{head.request_id}"
        self._begun: set[int] = set()

    def _plain(self, index: int, text: str) -> msgspec.Struct:
        return self._chunk(shapes.ChatChunkChoice(index, shapes.ChatDelta(content=text)))

    def _is_plain(self, delta: AnswerDelta) -> bool:
        return super()._is_plain(delta) and delta.index in self._begun

    def chunks(self, delta: AnswerDelta, answer: Answer) -> Iterator[msgspec.Struct]:
        piece = delta.piece
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._chunk(shapes.ChatChunkChoice(delta.index, shapes.ChatDelta("assistant", "")))
        if piece.text or (piece.shown and self._wishes.logprobs):
            content = shapes.ChatDelta(content=piece.text)
            yield self._chunk(shapes.ChatChunkChoice(delta.index, content, self._logprobs(piece.shown)))
        if piece.finished:
            finish = shapes.finish_name(piece.finish_reason)
            choice = shapes.ChatChunkChoice(delta.index, shapes.ChatDelta(), None, finish)
            yield self._chunk(choice, self._closing_account(delta, answer))

    def last_chunks(self, answer: Answer) -> Iterator[msgspec.Struct]:
        if self._wishes.usage_chunk:
            yield shapes.ChatCompletionChunk(
                id=self._id,
                object="chat.completion.chunk",
                created=self._head.created,
                model=self._head.model,
                choices=[],
                usage=shapes.usage_of(answer),
                slipstream=self._account(answer),
            )

    def whole(self, answer: Answer, collected: list[Collected]) -> msgspec.Struct:
        return shapes.ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._head.created,
            model=self._head.model,
            choices=[
                shapes.ChatChoice(index, shapes.ChatMessage(one.text), self._logprobs(one.tokens), one.finish_reason)
                for index, one in enumerate(collected)
            ],
            usage=shapes.usage_of(answer),
            slipstream=self._account(answer),
        )

    def _chunk(
        self, choice: shapes.ChatChunkChoice, account: shapes.SlipstreamAccount | UnsetType = UNSET
    ) -> shapes.ChatCompletionChunk:
        return shapes.ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            choices=[choice],
            usage=self._usage_field(),
            slipstream=account,
        )

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> shapes.ChatLogprobs | None:
        return shapes.chat_logprobs(tokens, self._text_model) if self._wishes.logprobs else None


class CompletionWriter(_Base):
    """/v1/completions."""

    def _plain(self, index: int, text: str) -> msgspec.Struct:
        return self._completion([shapes.CompletionChoice(text, index)], self._usage_field())

    def chunks(self, delta: AnswerDelta, answer: Answer) -> Iterator[msgspec.Struct]:
        piece = delta.piece
        if piece.text or (piece.shown and self._wishes.logprobs):
            yield self._completion(
                [shapes.CompletionChoice(piece.text, delta.index, self._logprobs(piece.shown))], self._usage_field()
            )
        if piece.finished:
            choice = shapes.CompletionChoice("", delta.index, None, shapes.finish_name(piece.finish_reason))
            yield self._completion([choice], self._usage_field(), self._closing_account(delta, answer))

    def last_chunks(self, answer: Answer) -> Iterator[msgspec.Struct]:
        if self._wishes.usage_chunk:
            yield self._completion([], shapes.usage_of(answer), self._account(answer))

    def whole(self, answer: Answer, collected: list[Collected]) -> msgspec.Struct:
        choices = [
            shapes.CompletionChoice(one.text, index, self._logprobs(one.tokens), one.finish_reason)
            for index, one in enumerate(collected)
        ]
        return self._completion(choices, shapes.usage_of(answer), self._account(answer))

    def _completion(
        self,
        choices: list[shapes.CompletionChoice],
        usage: shapes.Usage | UnsetType | None,
        account: shapes.SlipstreamAccount | UnsetType = UNSET,
    ) -> shapes.Completion:
        return shapes.Completion(
            id=f"cmpl-{self._head.request_id}",
            object="text_completion",
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=usage,
            slipstream=account,
        )

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> shapes.CompletionLogprobs | None:
        return shapes.completion_logprobs(tokens, self._text_model) if self._wishes.logprobs else None
