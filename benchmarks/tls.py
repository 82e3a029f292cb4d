"""What certificates and tokens cost: `python -m benchmarks.tls [--json]`.

Four times the same frontend with workers that take no time, all up at once: without anything, with a cluster token,
with certificates between components, and with certificates between components and on the HTTP face. They get the same
small load in turn, one after another, so that what else the machine does meets all of them: compared is what each took
with what the first took in the same round. CPU seconds of the frontend's and the workers' processes, and waits of one
client that asks one thing after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import ssl
import string
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Say
from benchmarks.frontend_servers import MODEL_NAME, MeasuredFrontend, slipstream_frontend
from benchmarks.report import Machine, Target, machine
from benchmarks.samples import percentile
from benchmarks.stream_load import Streamed, chat_request, closed_load
from slipstream import model_folder
from slipstream.errors import UnavailableError
from slipstream.security.authority import make_everything
from slipstream.security.identity import CA_FILE, FACE, pair
from slipstream.security_settings import SecuritySettings
from slipstream.settings import DEFAULT_MODEL

PLAIN, TOKEN, COMPONENTS, EVERYTHING = "nothing", "cluster token", "mTLS between components", "and TLS on the face"
_HOST = "localhost"  # the name in the face's certificate
_STEP_S = 0.01
_LOAD_TIMEOUT_S = 120.0
_RUN_TIMEOUT_S = 1800.0
_SECRET = "benchmark-" + "0" * 32

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What each is asked in each round: little, and in many rounds, so that what is compared is near in time.

    Attributes:
        requests: of `tokens` tokens each, one every 10 ms, over `connections` connections; and as many of one token.
        alone: requests of one token, one after another on one connection, of which the waits count.
        fresh: connections that are opened for one request each.
    """

    requests: int = 32
    tokens: int = 64
    connections: int = 16
    alone: int = 30
    fresh: int = 12
    rounds: int = 30
    words: int = 50
    seed: int = 9


@dataclass(frozen=True, slots=True)
class Round:
    """What one took; CPU of frontend and workers together."""

    request_us: float
    token_us: float
    fresh_us: float
    wait_p50_ms: float
    fresh_wait_p50_ms: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the rounds.

    Attributes:
        request_us: CPU microseconds of a request of one token, on a connection that is open.
        token_us: of each further token, streamed as an event of its own.
        fresh_us: of a request of one token on a connection of its own.
        wait_ratio: the wait for an answer of one token by that without protection, in pairs of the same round.
        fresh_wait_ratio: the same for a connection of its own, the handshake included.
    """

    protected: str
    request_us: float
    token_us: float
    fresh_us: float
    more_request_us: float
    more_token_us: float
    more_fresh_us: float
    wait_p50_ms: float
    wait_ratio: float
    fresh_wait_p50_ms: float
    fresh_wait_ratio: float


@dataclass(frozen=True, slots=True)
class Report:
    plan: Plan
    machine: Machine
    costs: list[Cost]
    rounds: dict[str, list[Round]]
    targets: list[Target]


@app.command()
def tls(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One short round: shows that all works.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = Plan().rounds,
    model: Annotated[str, typer.Option("--model", help="A local folder or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Measure what a cluster token, mTLS between components and TLS on the face cost."""
    plan = Plan(requests=16, alone=10, fresh=5, rounds=1) if quick else Plan(rounds=rounds)
    facts = machine()
    command.show(command.run(lambda logs, say: _run(plan, facts, model, logs, say), _RUN_TIMEOUT_S), as_json, _print)


async def _run(plan: Plan, facts: Machine, model: str, logs: Path, say: Say) -> Report:
    folder = (await asyncio.to_thread(model_folder.resolve, model, weights=False)).path
    ways = await asyncio.to_thread(_protections, logs)
    trust = ssl.create_default_context(cafile=str(logs / "certificates" / CA_FILE))
    chance, rounds = random.Random(plan.seed), {name: list[Round]() for name in ways}
    async with AsyncExitStack() as stack:
        up: dict[str, tuple[MeasuredFrontend, ssl.SSLContext | None]] = {}
        for number, (name, security) in enumerate(ways.items()):
            say(f"starting: {name}")
            where = logs / str(number)
            where.mkdir()
            starting = slipstream_frontend(folder, where, step_s=_STEP_S, security=security)
            up[name] = await stack.enter_async_context(starting), trust if name == EVERYTHING else None
        for number in range(plan.rounds + 1):
            say(f"round {number} of {plan.rounds}" if number else "warming up")
            order = list(up)
            for name in order if number % 2 else reversed(order):
                seen = await _round(*up[name], plan, chance)
                if number:
                    rounds[name].append(seen)
    return Report(plan, facts, _costs(rounds), rounds, [])


def _protections(logs: Path) -> dict[str, SecuritySettings]:
    whole, without_face, token = logs / "certificates", logs / "without-face", logs / "token"
    make_everything(whole, "benchmark", [], days=1.0, authority_days=2.0)
    shutil.copytree(whole, without_face)
    for file in pair(without_face, FACE):
        file.unlink()
    token.write_text(f"{_SECRET}\n")
    return {
        PLAIN: SecuritySettings(),
        TOKEN: SecuritySettings(cluster_token_file=token),
        COMPONENTS: SecuritySettings(tls_folder=without_face),
        EVERYTHING: SecuritySettings(tls_folder=whole),
    }


async def _round(frontend: MeasuredFrontend, trust: ssl.SSLContext | None, plan: Plan, chance: random.Random) -> Round:
    def asked(count: int, tokens: int) -> list[bytes]:
        return [chat_request(_HOST, MODEL_NAME, _prompt(chance, plan.words), tokens) for _ in range(count)]

    async def load(requests: list[bytes], tokens: int, connections: int) -> tuple[Streamed, float]:
        before_s = _cpu_s(frontend)
        seen = await closed_load(
            _HOST, frontend.port, requests, connections=connections, timeout_s=_LOAD_TIMEOUT_S, tls=trust
        )
        if seen.errors or seen.tokens != len(requests) * tokens:
            raise UnavailableError(f"{len(seen.errors)} failed, {seen.tokens} tokens: {seen.errors[:1]}")
        return seen, (_cpu_s(frontend) - before_s) / len(requests) * 1e6

    async def fresh(requests: list[bytes]) -> tuple[list[float], float]:
        """Waits and CPU of requests with a connection each."""
        before_s = _cpu_s(frontend)
        waits_s = [(await load([request], 1, 1))[0].wall_s for request in requests]
        return waits_s, (_cpu_s(frontend) - before_s) / len(requests) * 1e6

    _, long_us = await load(asked(plan.requests, plan.tokens), plan.tokens, plan.connections)
    _, short_us = await load(asked(plan.requests, 1), 1, plan.connections)
    alone, alone_us = await load(asked(plan.alone, 1), 1, 1)
    fresh_waits_s, fresh_us = await fresh(asked(plan.fresh, 1))
    return Round(
        request_us=alone_us,
        token_us=(long_us - short_us) / (plan.tokens - 1),
        fresh_us=fresh_us,
        wait_p50_ms=percentile(alone.total_s, 50) * 1e3,
        fresh_wait_p50_ms=percentile(fresh_waits_s, 50) * 1e3,
    )


def _prompt(chance: random.Random, words: int) -> str:
    return " ".join("".join(chance.choices(string.ascii_lowercase, k=5)) for _ in range(words))


def _cpu_s(frontend: MeasuredFrontend) -> float:
    """By the scheduler's own clocks: `stat` counts in steps of 10 ms, which is more than a request takes."""
    spent_ns = 0
    for leader in (psutil.Process(frontend.pid), psutil.Process(frontend.workers_pid)):
        for process in (leader, *leader.children(recursive=True)):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                    spent_ns += int((task / "schedstat").read_text().split()[0])
    return spent_ns / 1e9


def _costs(rounds: Mapping[str, list[Round]]) -> list[Cost]:
    plain = rounds[PLAIN]
    made = []
    for name, own in rounds.items():
        pairs = list(zip(own, plain, strict=True))
        made.append(
            Cost(
                name,
                request_us=round(median(one.request_us for one in own), 1),
                token_us=round(median(one.token_us for one in own), 1),
                fresh_us=round(median(one.fresh_us for one in own), 1),
                more_request_us=round(median(one.request_us - other.request_us for one, other in pairs), 1),
                more_token_us=round(median(one.token_us - other.token_us for one, other in pairs), 1),
                more_fresh_us=round(median(one.fresh_us - other.fresh_us for one, other in pairs), 1),
                wait_p50_ms=round(median(one.wait_p50_ms for one in own), 3),
                wait_ratio=round(median(one.wait_p50_ms / other.wait_p50_ms for one, other in pairs), 3),
                fresh_wait_p50_ms=round(median(one.fresh_wait_p50_ms for one in own), 3),
                fresh_wait_ratio=round(
                    median(one.fresh_wait_p50_ms / other.fresh_wait_p50_ms for one, other in pairs), 3
                ),
            )
        )
    return made


def _print(console: Console, report: Report) -> None:
    table = Table(title="CPU of frontend and workers, and waits (p50)", title_justify="left")
    for column in ("protected by", "µs a request", "µs a token", "µs on a new connection", "wait", "on a new one"):
        table.add_column(column, justify="left" if column == "protected by" else "right")
    for one in report.costs:
        table.add_row(
            one.protected,
            f"{one.request_us:.0f} ({one.more_request_us:+.0f})",
            f"{one.token_us:.1f} ({one.more_token_us:+.1f})",
            f"{one.fresh_us:.0f} ({one.more_fresh_us:+.0f})",
            f"{one.wait_p50_ms:.2f} ms ({one.wait_ratio:.2f}x)",
            f"{one.fresh_wait_p50_ms:.2f} ms ({one.fresh_wait_ratio:.2f}x)",
        )
    console.print(table)
    console.print(f"{report.machine.cpu}, {report.machine.cores} cores, {report.machine.date}")


if __name__ == "__main__":
    app()
