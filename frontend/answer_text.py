"""One answer's way from token deltas to text: detokenized, cut at a stop string, each token with its place.

Pure: no clock, no I/O. The faces differ in what they show of an answer (the HTTP face only tokens whose text it
shows, the gRPC face every token as it comes), so a piece carries both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from frontend.detokenizer import Detokenizer, StopStrings
from frontend.generation import TokenDelta
from slipstream.v1.sampling_pb2 import FinishReason, TokenLogprobs

# Enumerations of protobuf look their members up by name, each time.
_STOP = FinishReason.FINISH_REASON_STOP


class PlacedToken(msgspec.Struct, frozen=True, gc=False):
    """A generated token, its log probabilities when asked for, and where its text begins in the answer.

    One is made for each token: of this kind it takes a fifth of the time that a frozen dataclass takes.
    """

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None = None


class AnswerPiece(msgspec.Struct, frozen=True):
    """What a delta adds to the answer.

    Attributes:
        text: what may be shown now; text that could begin a stop string waits.
        arrived: the tokens of this delta that count, whether or not their text is out.
        shown: the tokens whose text is out with this piece. Never an end-of-sequence token, nor one whose text
            lies behind the cut of a stop string.
        finish_reason: set on the last piece, after which nothing may be fed.
        stop_reason: the stop string or the id of the stop token that ended the answer.
    """

    text: str
    arrived: Sequence[PlacedToken]
    shown: Sequence[PlacedToken]
    finish_reason: FinishReason.ValueType = FinishReason.FINISH_REASON_UNSPECIFIED
    stop_reason: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.finish_reason)  # unspecified is 0


class AnswerText:
    """Assembles one answer.

    Args:
        stop: stop strings; the answer is cut before the first that is complete.
        min_tokens: text of this many tokens is not searched for stop strings.
        stop_token_ids: a last token among these ended the answer and is no part of its text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._stoppable = bool(stop)
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._decoded_characters = 0
        self._shown_characters = 0
        self._waiting: list[PlacedToken] = []
        self.completion_tokens = 0

    def feed(self, delta: TokenDelta) -> AnswerPiece:
        """Add tokens. Those after the one that completes a stop string are as if never generated."""
        stopped = delta.finish_reason == _STOP
        arrived: list[PlacedToken] = []
        texts: list[str] = []
        for position, token_id in enumerate(delta.token_ids):
            logprobs = delta.logprobs[position] if position < len(delta.logprobs) else None
            token = PlacedToken(token_id, self._decoded_characters, logprobs)
            arrived.append(token)
            self.completion_tokens += 1
            is_last = position == len(delta.token_ids) - 1
            if stopped and is_last and token_id in self._stop_token_ids:
                break
            self._waiting.append(token)
            text, stop = self._through(self._detokenizer.push(token_id))
            texts.append(text)
            if stop is not None:
                return self._cut("".join(texts), arrived, stop)
        if not delta.finish_reason:
            return self._piece("".join(texts), arrived)
        return self._last(delta, texts, arrived)

    def _last(self, delta: TokenDelta, texts: list[str], arrived: list[PlacedToken]) -> AnswerPiece:
        text, stop = self._through(self._detokenizer.finish())
        texts.append(text)
        if stop is not None:
            return self._cut("".join(texts), arrived, stop)
        texts.append(self._stops.finish())
        shown, self._waiting = self._waiting, []
        return AnswerPiece("".join(texts), arrived, shown, delta.finish_reason, delta.stop_reason)

    def _through(self, text: str) -> tuple[str, str | None]:
        self._decoded_characters += len(text)
        if not self._stoppable or self.completion_tokens <= self._min_tokens:
            return text, None
        released = self._stops.push(text)
        return released.text, released.stop

    def _cut(self, text: str, arrived: list[PlacedToken], stop: str) -> AnswerPiece:
        piece = self._piece(text, arrived)
        return AnswerPiece(text, arrived, piece.shown, _STOP, stop)

    def _piece(self, text: str, arrived: list[PlacedToken]) -> AnswerPiece:
        self._shown_characters += len(text)
        shown: list[PlacedToken] = []
        while self._waiting and self._waiting[0].text_offset < self._shown_characters:
            shown.append(self._waiting.pop(0))
        return AnswerPiece(text, arrived, shown)
