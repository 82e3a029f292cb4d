"""One streamed completion over HTTP, with the time at which each of its tokens arrived.

The same client for every server, so its own cost is the same too. A token is counted when an SSE event with text
arrives; a token whose text waits for the next one (half of a character) has no event of its own, and the answer's
usage tells how many those were.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from slipstream.errors import DeadlineError, UnavailableError

_CONNECT_TIMEOUT_S = 5.0
_END = b"\n\n"
_DATA = b"data: "


@dataclass(frozen=True, slots=True)
class Question:
    """A completion to ask for: greedy, of exactly `max_tokens` tokens.

    Attributes:
        with_account: ask Slipstream what the request cost; other servers do not know the field.
    """

    token_ids: Sequence[int]
    max_tokens: int
    with_account: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body of POST /v1/completions."""
        extension = {"slipstream": {"account": True}} if self.with_account else {}
        return {
            "model": model,
            "prompt": list(self.token_ids),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extension,
        }


@dataclass(slots=True)
class Answer:
    """What came back, filled in as it comes; times by the client's monotonic clock.

    Attributes:
        arrivals_s: of each event with text.
        reads: from the network that brought text; fewer than arrivals when several events came in one.
        completion_tokens: as the server counted; 0 until the end.
        account: Slipstream's account of the request, when it was asked for.
    """

    prompt_tokens: int
    sent_s: float = 0.0
    ended_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    reads: int = 0
    completion_tokens: int = 0
    text: str = ""
    account: dict[str, Any] | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """The inter-token latencies."""
        return [after - before for before, after in itertools.pairwise(self.arrivals_s)]


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Extension(msgspec.Struct):
    account: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    slipstream: _Extension | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class LoadClient:
    """Asks one server. Use as an async context manager.

    Args:
        url: of the server, without `/v1`.
        timeout_s: longest one answer may take in all.
    """

    def __init__(self, url: str, model: str, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._clock = clock
        self._http = httpx.AsyncClient(
            base_url=url, timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S), trust_env=False
        )

    async def __aenter__(self) -> LoadClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._http.__aexit__(*exception)

    async def ask(self, question: Question, on_token: Callable[[Answer], None] | None = None) -> Answer:
        """Ask and read the answer to its end; see `ask_into`."""
        answer = Answer(prompt_tokens=len(question.token_ids))
        await self.ask_into(answer, question, on_token)
        return answer

    async def ask_into(
        self, answer: Answer, question: Question, on_token: Callable[[Answer], None] | None = None
    ) -> None:
        """Ask, and fill `answer` in while it comes. Cancelling hangs up.

        Raises:
            UnavailableError: the server refused, failed, or sent no token.
            DeadlineError: the answer was not whole in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(answer, question, on_token)
        except TimeoutError:
            message = f"no whole answer to a prompt of {answer.prompt_tokens} tokens within {self._timeout_s:g} s"
            raise DeadlineError(message) from None
        except httpx.HTTPError as error:
            raise UnavailableError(f"the connection failed: {error!r}") from error
        if not answer.arrivals_s:
            raise UnavailableError(f"no token came back for a prompt of {answer.prompt_tokens} tokens")

    async def _read(self, answer: Answer, question: Question, on_token: Callable[[Answer], None] | None) -> None:
        body = msgspec.json.encode(question.body(self._model))
        headers = {"content-type": "application/json"}
        answer.sent_s = self._clock()
        async with self._http.stream("POST", "/v1/completions", content=body, headers=headers) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise UnavailableError(f"the server answered {response.status_code}: {text[:400]}")
            pending = b""
            async for block in response.aiter_raw():
                now_s = self._clock()
                *events, pending = (pending + block).split(_END)
                before = len(answer.arrivals_s)
                for event in events:
                    _take(answer, event, now_s)
                if len(answer.arrivals_s) > before:
                    answer.reads += 1
                    if on_token is not None:
                        on_token(answer)
        answer.ended_s = self._clock()


def _take(answer: Answer, event: bytes, now_s: float) -> None:
    data = event.strip().removeprefix(_DATA)
    if not data or data == b"[DONE]":
        return
    decoded = _decode(data)
    if decoded.error is not None:
        raise UnavailableError(f"the server failed in the middle of an answer: {decoded.error}")
    if text := "".join(choice.text for choice in decoded.choices):
        answer.arrivals_s.append(now_s)
        answer.text += text
    if decoded.usage is not None:
        answer.completion_tokens = decoded.usage.completion_tokens
    if decoded.slipstream is not None:
        answer.account = decoded.slipstream.account or answer.account
