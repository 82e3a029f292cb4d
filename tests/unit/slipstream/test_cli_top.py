"""`slipstream top` before a real control plane and frontend: in a terminal, for programs, and through outages."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from slipstream.cli.scrape import Page, fetch, parse, quantile
from slipstream.cli.top_figures import Figures, Look, figures
from slipstream.cli.top_page import page
from slipstream.errors import UnavailableError
from slipstream.v1.registry_pb2 import (
    Capacity,
    Health,
    HealthReason,
    HealthState,
    Load,
    Role,
    WorkerRecord,
    WorkerState,
)
from tests.support.scripted_cluster import ScriptedCluster, scripted_cluster
from tests.support.scripted_frontend import listening_frontend
from tests.support.scripted_worker import MODEL

COMMAND = (sys.executable, "-m", "slipstream", "top")
PATIENCE_S = 20.0
HIDDEN = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """`slipstream top` in a pseudo-terminal."""

    def __init__(self, leader: int, process: asyncio.subprocess.Process) -> None:
        self._leader = leader
        self.process = process
        self.seen = b""

    async def until(self, *words: str) -> str:
        """What is on the screen from now on, as plain text, once all these words have come."""
        start = len(self.seen)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                shown = HIDDEN.sub(b"", self.seen[start:]).decode(errors="replace")
                if all(word in shown for word in words):
                    return shown
                self.seen += await asyncio.to_thread(os.read, self._leader, 65536)

    async def rest(self) -> None:
        """Read until the program has ended."""
        try:
            while chunk := await asyncio.to_thread(os.read, self._leader, 65536):
                self.seen += chunk
        except OSError:  # Linux' way to say that the other side is closed
            return

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press_ctrl_c(self) -> None:
        os.write(self._leader, b"\x03")


@asynccontextmanager
async def terminal(*arguments: str) -> AsyncIterator[Terminal]:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        preexec_fn=own_terminal,
        # Its size is the terminal's, not what the environment says of another one.
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm"},
    )
    os.close(follower)
    try:
        yield Terminal(leader, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(leader)


async def run(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def where(cluster: ScriptedCluster, url: str) -> tuple[str, ...]:
    return "--control-plane", cluster.registry_address, "--frontend", url, "--interval-s", "0.3"


async def ask(url: str, times: int) -> None:
    body = {"model": MODEL, "prompt": list(range(5, 45)), "max_tokens": 8}
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        for _ in range(times):
            (await client.post("/v1/completions", json=body)).raise_for_status()


async def test_it_shows_the_cluster_follows_the_terminal_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    async with scripted_cluster(decode=2) as cluster, listening_frontend(cluster, tmp_path) as url:
        async with terminal(*where(cluster, url)) as screen:
            await screen.until("requests/s", "TTFT", "p0", "prefill", "d0", "d1", "decode", "ready")
            await ask(url, 3)
            shown = await screen.until("requests/s", "ms p50")
            screen.resize(70, 9)
            await screen.until("and 1 more")
            screen.press_ctrl_c()
            await screen.rest()
            assert await screen.process.wait() == 0
        assert "slipstream top" in shown
        # The cursor is back, and so is what was on the terminal before.
        assert screen.seen.endswith(b"\x1b[?25h\x1b[?1049l")


async def test_it_goes_on_with_what_it_knows_when_the_control_plane_is_gone(tmp_path: Path) -> None:
    """A control plane that really ends: a process of its own, killed."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND[:-1], "planner", "serve", "--port", "0", stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            line = await process.stderr.readline()
        found = re.search(rb"address=\S*?(127\.0\.0\.1:\d+)", HIDDEN.sub(b"", line))
        assert found is not None, line
        async with terminal(
            "--control-plane", found[1].decode(), "--frontend", "127.0.0.1:9", "--interval-s", "0.3"
        ) as screen:
            await screen.until("knows no worker", "! http://127.0.0.1:9/metrics")
            process.kill()
            await screen.until("! control plane", "lost")
            screen.press_ctrl_c()
            await screen.rest()
            assert await screen.process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_once_and_json_are_for_programs(tmp_path: Path) -> None:
    async with scripted_cluster() as cluster, listening_frontend(cluster, tmp_path) as url:
        asking = asyncio.create_task(ask(url, 40))
        status, out, _ = await run(*where(cluster, url), "--once", "--json")
        await asking
    shown: dict[str, Any] = json.loads(out)
    assert status == 0
    assert [(row["worker_id"], row["role"], row["state"]) for row in shown["workers"]] == [
        ("p0", "prefill", "ready"),
        ("d0", "decode", "ready"),
    ]
    assert shown["problems"] == []
    assert shown["cluster"]["errors_per_s"] == 0


async def test_without_a_control_plane_it_says_so_and_how_to_name_another() -> None:
    status, _, err = await run("--control-plane", "127.0.0.1:9", "--once")
    assert status == 1
    assert "no control plane answers at 127.0.0.1:9" in err
    assert "--control-plane HOST:PORT" in err


def a_look(at_s: float, text: str, *records: WorkerRecord) -> Look:
    return Look(at_s, {"f": parse(text)}, records, {})


def a_worker(tokens: int, *, epoch: int = 1) -> WorkerRecord:
    return WorkerRecord(
        worker_id="d0",
        role=Role.ROLE_DECODE,
        state=WorkerState.READY,
        epoch=epoch,
        capacity=Capacity(blocks=10),
        load=Load(tokens_total=tokens, blocks_used=5, waiting=2),
    )


def counters(requests: int, prompt_tokens: int, cached: int, failed: int) -> str:
    return (
        f'slipstream_frontend_input_sequence_tokens_count{{model="m"}} {requests}\n'
        f'slipstream_frontend_input_sequence_tokens_sum{{model="m"}} {prompt_tokens}\n'
        f'slipstream_frontend_cached_prompt_tokens_total{{model="m"}} {cached}\n'
        f'slipstream_frontend_requests_total{{code="200"}} {requests}\n'
        f'slipstream_frontend_requests_total{{code="400"}} 7\n'
        f'slipstream_frontend_requests_total{{code="503"}} {failed}\n'
        f'slipstream_frontend_time_to_first_token_seconds_bucket{{le="0.1"}} {requests // 2}\n'
        f'slipstream_frontend_time_to_first_token_seconds_bucket{{le="0.2"}} {requests}\n'
        f'slipstream_frontend_time_to_first_token_seconds_bucket{{le="+Inf"}} {requests}\n'
    )


def shown_between(before: str, now: str, first: WorkerRecord, second: WorkerRecord) -> Figures:
    return figures(a_look(10.0, before, first), a_look(20.0, now, second))


def test_rates_are_of_the_time_between_two_looks() -> None:
    shown = shown_between(counters(10, 1000, 0, 1), counters(30, 3000, 500, 2), a_worker(100), a_worker(400))
    cluster, (worker,) = shown.cluster, shown.workers
    assert (cluster.requests_per_s, cluster.errors_per_s, cluster.prompt_tokens_per_s) == (2.0, 0.1, 200.0)
    assert cluster.hit_rate == 0.25
    assert cluster.ttft_p50_s == pytest.approx(0.1)
    assert cluster.ttft_p99_s == pytest.approx(0.198)
    assert (worker.tokens_per_s, worker.kv_use, cluster.queued) == (30.0, 0.5, 2)


def test_a_frontend_or_worker_that_was_restarted_began_at_nothing() -> None:
    shown = shown_between(counters(100, 1000, 0, 50), counters(20, 200, 0, 1), a_worker(900), a_worker(5, epoch=2))
    assert (shown.cluster.requests_per_s, shown.cluster.errors_per_s) == (2.0, 0.1)
    assert shown.workers[0].tokens_per_s == 0.0


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, {}, None),
        (0.5, {1.0: 0.0, float("inf"): 0.0}, None),
        (0.5, {1.0: 10.0, float("inf"): 10.0}, 0.5),
        (0.75, {1.0: 10.0, 3.0: 20.0, float("inf"): 20.0}, 2.0),
        (0.99, {1.0: 1.0, float("inf"): 100.0}, 1.0),
    ],
)
def test_quantiles_are_prometheus_estimates(share: float, buckets: dict[float, float], expected: float | None) -> None:
    assert quantile(share, buckets) == expected


async def test_a_page_that_is_none_is_an_error_with_its_address(tmp_path: Path) -> None:
    async with scripted_cluster() as cluster, listening_frontend(cluster, tmp_path) as url:
        assert (await fetch(f"{url}/metrics", 5)).total("slipstream_frontend_registry_connected") == 1
        with pytest.raises(UnavailableError, match="404"):
            await fetch(f"{url}/nothing", 5)
    assert Page().total("anything") == 0


def test_a_sick_worker_is_named_with_what_is_wrong() -> None:
    sick = a_worker(5)
    sick.state = WorkerState.FENCED
    reasons = [HealthReason(code="xid_79", state=HealthState.SICK, text="GPU 0 has fallen off the bus")]
    sick.health.CopyFrom(Health(state=HealthState.SICK, reasons=reasons))
    shown = figures(a_look(10.0, "", sick), a_look(20.0, "", sick))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(page(shown, "r"))
    assert "! d0 is sick: GPU 0 has fallen off the bus" in console.export_text()
