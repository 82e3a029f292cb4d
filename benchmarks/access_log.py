"""What it costs a frontend to observe a request: metrics, a line in the log, a line in the access log, a trace.

    python -m benchmarks.access_log --json

CPU time of everything around a request that observes it, without the request itself: each way in a process of its own,
so that none pays for another's threads. Traces go to a collector in one more process, which takes them and does no
more; there are pauses between them, so that the exporter's queue does not overflow and nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from benchmarks.command import Say
from benchmarks.report import Machine, machine
from benchmarks.server import child_environ
from frontend import access_log
from frontend.face_metrics import TokenTimes, Where
from frontend.request_life import observed, received, stage
from slipstream import telemetry, tracing
from slipstream.errors import StartupError
from slipstream.free_ports import free_port
from slipstream.settings import LogSettings, TracingSettings

_REQUESTS = 2000
_ROUNDS = 7
_PROMPT_TOKENS = 200
_PAUSE_EVERY = 200
"""Requests whose spans, five each, the exporter's queue holds."""
_PAUSE_S = 0.25
_WHERE = Where("http", "completions", "model")
_TIMEOUT_S = 600.0
_ROW_TIMEOUT_S = 120.0
_COLLECTOR = "collector"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to observe requests.

    Attributes:
        tokens: of each request's answer, one at a time.
        traced: share of requests whose traces are sent; None: there is no tracing.
    """

    name: str
    log: LogSettings
    tokens: int = 1
    access_log: bool = False
    blocks: bool = False
    traced: float | None = None


_QUIET = LogSettings(requests=False)
_WAYS = (
    Way("metrics alone", _QUIET),
    Way("metrics, 65 tokens", _QUIET, tokens=65),
    Way("and a line in the log, console", LogSettings(format="console")),
    Way("and a line in the log, JSON", LogSettings(format="json")),
    Way("metrics and a line in the access log", _QUIET, access_log=True),
    Way("the same, with the prompt's blocks", _QUIET, access_log=True, blocks=True),
    Way("metrics and a trace, not sampled", _QUIET, traced=0.0),
    Way("metrics and a trace, sampled and sent", _QUIET, traced=1.0),
)


@dataclass(frozen=True, slots=True)
class Row:
    """CPU time of a request: the best round and the median one."""

    name: str
    best_us: float
    median_us: float


@dataclass(frozen=True, slots=True)
class Report:
    """All ways, and what one more token costs."""

    machine: Machine
    requests: int
    rows: list[Row]
    token_us: float


@app.command()
def main(
    json: Annotated[bool, typer.Option("--json", help="the report as JSON")] = False,
    only: Annotated[str, typer.Option(hidden=True, help="measure this way in this process")] = "",
    port: Annotated[int, typer.Option(hidden=True, help="of the collector")] = 0,
) -> None:
    """Measure what observing a request costs."""
    if only == _COLLECTOR:
        _collect(port)
    elif only:
        print(*_measured(next(one for one in _WAYS if one.name == only), port))  # noqa: T201 - to the parent
    else:
        facts = machine()
        command.show(command.run(lambda logs, say: _measure(facts, logs, say), _TIMEOUT_S), json, _print)


async def _measure(facts: Machine, logs: Path, say: Say) -> Report:
    rows, port = [], free_port()
    collector = await _child(logs, _COLLECTOR, port)
    try:
        for way in _WAYS:
            say(way.name)
            rows.append(await _row(logs, way.name, port))
    finally:
        collector.terminate()
        await collector.wait()
    alone, tokens = rows[0].best_us, rows[1].best_us
    more = _WAYS[1].tokens - _WAYS[0].tokens
    return Report(facts, _REQUESTS * _ROUNDS, rows, round((tokens - alone) / more, 2))


async def _row(logs: Path, name: str, port: int) -> Row:
    child = await _child(logs, name, port)
    try:
        async with asyncio.timeout(_ROW_TIMEOUT_S):
            said, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise StartupError(f"measuring {name!r} ended with code {child.returncode}")
    best_us, median_us = map(float, said.split())
    return Row(name, best_us, median_us)


async def _child(logs: Path, name: str, port: int) -> asyncio.subprocess.Process:
    """Its log goes to a file, as a frontend's does where it runs for long."""
    with (logs / "children.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "benchmarks.access_log", "--only", name, "--port", str(port)),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=child_environ(os.environ),
            cwd=logs,
        )


def _measured(way: Way, port: int) -> tuple[float, float]:
    """Microseconds of CPU time a request: best and median round."""
    telemetry.configure(way.log, component="frontend")
    settings = way.log.model_copy(
        update={"access_log": Path("access.jsonl") if way.access_log else None, "access_log_blocks": way.blocks}
    )
    rounds = []
    with access_log.writing(settings), _tracing(way, port):
        for _ in range(_ROUNDS):
            began_s = time.process_time()
            for number in range(_REQUESTS):
                _request(way.tokens, number)
                if way.traced and number % _PAUSE_EVERY == 0:
                    time.sleep(_PAUSE_S)
            rounds.append((time.process_time() - began_s) / _REQUESTS * 1e6)
    rounds.sort()
    return round(rounds[0], 1), round(rounds[len(rounds) // 2], 1)


@contextlib.contextmanager
def _tracing(way: Way, port: int) -> Iterator[None]:
    endpoint = None if way.traced is None else f"http://127.0.0.1:{port}"
    settings = TracingSettings(endpoint=endpoint, sample_ratio=way.traced or 0.0)
    with tracing.exporting(settings, service="slipstream-frontend", instance="benchmark"):
        yield


def _request(tokens: int, number: int) -> None:
    """All that observes a request, as the HTTP face and the parts behind it call it."""
    clock = time.monotonic
    with observed(
        _WHERE, f"request-{number}", method="POST", path="/v1/completions", headers={}, clock=clock
    ) as record:
        received(clock)
        record.model, record.service_class = "model", "realtime"
        times = TokenTimes(_WHERE, record, clock)
        with stage("tokenize"):
            pass
        record.prompt_tokens = _PROMPT_TOKENS
        if access_log.wants_prompts():
            record.prompts = [range(_PROMPT_TOKENS)]
        with stage("route"):
            pass
        record.note_route("prefill-0", "decode-0", "least_time")
        for _ in range(tokens):
            times.arrived(0, 1)
        times.close()
        record.status = "200"


def _collect(port: int) -> None:
    """Take whatever comes, until the end of this process."""

    class Anything(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=[Anything()])
        server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        server.wait_for_termination(_TIMEOUT_S)


def _print(console: Console, report: Report) -> None:
    table = Table("observed by", "µs, best", "µs, median", title="CPU time a request", title_justify="left")
    for row in report.rows:
        table.add_row(row.name, f"{row.best_us:g}", f"{row.median_us:g}")
    table.add_row("one more token", f"{report.token_us:g}", "")
    console.print(table)


if __name__ == "__main__":
    app()
