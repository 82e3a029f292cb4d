"""The load generator of overload and soak, a process of its own; `generate` starts it.

It reads a plan from standard input, sends each request at its time whether or not those before it are answered, sends
refused ones again as their clients would, and writes a JSON line for each try as it ends. The last line tells what it
cost: its CPU time, and how late requests were sent. Prompts are token ids drawn from the request's name.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from benchmarks.goodput import ANSWERED, FAILED, REFUSED, Try
from benchmarks.http_exchange import Answer, Connections
from benchmarks.offered_load import Lengths, Patience, Source, draw
from benchmarks.samples import percentile
from benchmarks.server import child_environ
from simulator.traces import Arrival
from slipstream.errors import SlipstreamError, StartupError

LEFT = "left"
"""Its client hung up in the middle of the answer, as planned."""

_VOCABULARY = (100, 40000)
_LINE_LIMIT = 1 << 20
_END_TIMEOUT_S = 30.0
_LEAVE_WITHIN_S = 2.0
_WORDS = ("river", "stone", "signal", "engine", "cloud", "paper", "winter", "seven", "copper", "garden")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to send where.

    Attributes:
        drain_s: after the last arrival, for answers to end; what has not ended then has failed.
        mixed: of eight requests one is a chat in text, one is not streamed, one continues an earlier conversation, and
            one is left by its client; otherwise all are streamed completions.
    """

    host: str
    port: int
    model: str
    rate_per_s: float
    seconds: float
    seed: int
    sources: tuple[Source, ...]
    lengths: Lengths
    patience: Patience
    drain_s: float = 60.0
    mixed: bool = False


class Cost(msgspec.Struct, frozen=True):
    """Of the generator itself.

    Attributes:
        cores: that it used on average.
        late_p99_s: by so much requests were sent after their time.
    """

    cores: float
    late_p99_s: float
    late_max_s: float


class _Line(msgspec.Struct, omit_defaults=True):
    one: Try | None = None
    cost: Cost | None = None


class Generator:
    """Sends one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._connections = Connections(plan.host, plan.port)
        self._chance = random.Random(plan.seed)
        self._began_s = 0.0
        self._late_s: list[float] = []
        self._open: set[asyncio.Task[None]] = set()

    async def run(self) -> Cost:
        """Until all have ended, or the time for that is over."""
        plan, cpu_s = self._plan, time.process_time()
        self._began_s = time.monotonic()
        for number, arrival in enumerate(draw(plan.rate_per_s, plan.seconds, plan.seed, plan.lengths, plan.sources)):
            await self._until(arrival.at_s)
            self._start(arrival, number)
        if self._open:
            await asyncio.wait(self._open, timeout=plan.seconds + plan.drain_s - self._now_s())
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)
        self._connections.close()
        wall_s = self._now_s()
        late = self._late_s or [0.0]
        return Cost((time.process_time() - cpu_s) / wall_s, percentile(late, 99), max(late))

    def _start(self, arrival: Arrival, number: int) -> None:
        task = asyncio.create_task(self._client(arrival, number))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _client(self, arrival: Arrival, number: int) -> None:
        """One request, and what its client does when it is refused."""
        patience, at_s = self._plan.patience, arrival.at_s
        for turn in range(patience.tries):
            await self._until(at_s)
            self._late_s.append(self._now_s() - at_s)
            one = await self._ask(arrival, number, turn)
            _write(_Line(one=one))
            if one.outcome != REFUSED or one.retry_after_s > patience.longest_s:
                return
            at_s = one.ended_s + one.retry_after_s + self._chance.uniform(0.0, patience.late_s)
            if at_s > self._plan.seconds + self._plan.drain_s:
                return

    async def _ask(self, arrival: Arrival, number: int, turn: int) -> Try:
        manner = number % 8 if self._plan.mixed else -1
        request = _request(self._plan, arrival, manner, number)
        leave_s = self._chance.uniform(0.0, _LEAVE_WITHIN_S) if manner == 1 else None
        sent_s, answer, error = self._now_s(), Answer(), ""
        try:
            answer = await self._connections.ask(request, leave_s)
        except SlipstreamError as failure:
            error = failure.message
        except asyncio.CancelledError:
            error = "no end of the answer in time"
        ended_s = self._now_s()
        outcome = _outcome(answer, error, left=leave_s is not None and not answer.tokens)
        after = max(1, answer.tokens - 1)
        return Try(
            arrival.request_id,
            turn,
            arrival.service_class,
            arrival.tenant,
            sent_s,
            ended_s,
            outcome,
            answer.first_s - self._began_s - sent_s if answer.first_s else 0.0,
            (answer.last_s - answer.first_s) / after,
            answer.tokens,
            error or (answer.code or str(answer.status) if outcome in (REFUSED, FAILED) else ""),
            answer.retry_after_s,
            answer.longest_gap_s,
            streamed=manner != 2,
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    async def _until(self, at_s: float) -> None:
        if (left_s := at_s - self._now_s()) > 0:
            await asyncio.sleep(left_s)


def _outcome(answer: Answer, error: str, *, left: bool) -> str:
    if answer.status == 429:
        return REFUSED
    if left and not error:
        return LEFT
    return ANSWERED if answer.status == 200 and answer.tokens and not error else FAILED


def _request(plan: Plan, arrival: Arrival, manner: int, number: int) -> bytes:
    body: dict[str, object] = {
        "model": plan.model,
        "max_tokens": arrival.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": manner != 2,
    }
    if manner != 2:
        body["stream_options"] = {"include_usage": True}
    path, more = "/v1/completions", ""
    if manner == 0:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": _text(arrival.request_id, arrival.input_tokens // 2)}]
    elif manner == 3:
        session = number // 64  # eight turns of one conversation, each with the prompt of the one before it
        body["prompt"] = _ids(f"{plan.seed}/{session}", 64 * (1 + number // 8 % 8))
        more = f"x-session-id: s{session}\r\n"
    else:
        body["prompt"] = _ids(arrival.request_id, arrival.input_tokens)
    content = msgspec.json.encode(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {plan.host}\r\nContent-Type: application/json\r\n{more}"
        f"x-slipstream-tenant: {arrival.tenant}\r\nx-slipstream-class: {arrival.service_class}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def _ids(name: str, tokens: int) -> list[int]:
    return random.Random(name).choices(range(*_VOCABULARY), k=tokens)


def _text(name: str, words: int) -> str:
    return " ".join(random.Random(name).choices(_WORDS, k=max(1, words)))


def _write(line: _Line) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


@asynccontextmanager
async def generate(plan: Plan) -> AsyncIterator[AsyncIterator[Try | Cost]]:
    """Start the process; iterate what comes of the plan while the block runs. The last one is the cost.

    Raises:
        StartupError: it ended without that.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "benchmarks.open_load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=child_environ(os.environ),
        limit=_LINE_LIMIT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(plan))
        process.stdin.close()
        yield _lines(process.stdout)
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(_END_TIMEOUT_S):
            await process.wait()


async def _lines(stdout: asyncio.StreamReader) -> AsyncIterator[Try | Cost]:
    decoder = msgspec.json.Decoder(_Line)
    async for text in stdout:
        line = decoder.decode(text)
        if line.one is not None:
            yield line.one
        elif line.cost is not None:
            yield line.cost
            return
    raise StartupError("the load generator ended before its load did")


def main() -> None:
    """The process."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    _write(_Line(cost=asyncio.run(Generator(plan).run())))


if __name__ == "__main__":
    main()
