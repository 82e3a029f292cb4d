"""A run: rounds of load and faults with a quiet point after each, judged all the time, and its report."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.chaos import isolation, judge, seats
from tests.faults.chaos.answers import Pool, make_pool
from tests.faults.chaos.books import Books
from tests.faults.chaos.checker import Checker
from tests.faults.chaos.clients import Clients, Try
from tests.faults.chaos.plan import EngineName, Plan, PlannedRequest, Round, Shape, draw
from tests.faults.chaos.pulse import Pulse
from tests.faults.chaos.quiet import QuietPoints, dump_stacks
from tests.faults.chaos.saboteur import READY_S, Saboteur
from tests.support import warm_processes
from tests.support.tiny_model import make_tiny_model, make_tiny_tokenizer

_STOP_S = 45.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Attributes:
        rate: requests a second; None: what the engine's shape has.
        keep_going: begin further rounds after a violation.
    """

    seed: int = 1
    minutes: float = 1.0
    engine: EngineName = "simulated"
    prefill: int = 2
    decode: int = 2
    frontends: int = 2
    rate: float | None = None
    keep_going: bool = True
    folder: Path | None = None

    def shape(self) -> Shape:
        own = {"prefill": self.prefill, "decode": self.decode, "frontends": self.frontends}
        if self.engine == "vllm":
            shape = Shape("vllm", **own, rate=2.0, fault_every_s=6.0, longest_answer=48)
        else:
            shape = Shape("simulated", **own)
        if self.rate is not None:
            values = {name: getattr(shape, name) for name in Shape.__slots__} | {"rate": self.rate}
            shape = Shape(**values)
        return shape

    def plan(self) -> Plan:
        return draw(self.seed, self.minutes, self.shape())


@dataclass(slots=True)
class Report:
    """What came of a run."""

    seed: int
    engine: str
    minutes: float = 0.0
    rounds: int = 0
    isolated: bool = False
    requests: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    faults_skipped: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    tokens_compared: int = 0
    slowest_request_s: float = 0.0
    slowest_recovery_s: dict[str, float] = field(default_factory=dict)
    slowest_quiet_s: float = 0.0
    quiet_points: int = 0
    starved_s: float = 0.0
    memory: list[dict[str, float | str | int]] = field(default_factory=list)
    violations: list[dict[str, Any]] = field(default_factory=list)
    folder: str = ""

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}


async def run(options: Options, say: Callable[[str], None] = lambda _: None) -> Report:
    """One run in this process: which becomes the parent of all that lose theirs, and had best be one of its own."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="slipstream-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    plan = options.plan()
    isolation.adopt_orphans()
    model = folder / "model"
    if options.engine == "vllm":
        warm_processes.start_fork_server()
        make_tiny_model(model)
    else:
        make_tiny_tokenizer(model)
    pool = await asyncio.to_thread(make_pool, options.seed, plan.shape, model, folder)
    checker = Checker(say, options.seed)
    report = Report(options.seed, options.engine, isolated=isolation.inside(), folder=str(folder))
    say(
        f"seed {options.seed}, {options.engine}, {len(plan.rounds)} rounds; prompts that cannot be compared: "
        f"{pool.unclear}; {'isolated' if report.isolated else 'NOT isolated: no packets are dropped'}; logs in {folder}"
    )

    def unasked(seat: seats.Seat, code: int) -> None:
        checker.check("no process ends by itself", False, f"{seat.name} ended with {code}; its log is {seat.log}")

    began_s = time.monotonic()
    async with seats.running(model, folder, plan.shape, unasked) as cluster:
        late = await cluster.until_ready(None, 2 * READY_S[options.engine])
        if checker.check("the cluster starts", not late, f"{late} not ready"):
            checker.began_s = began_s = time.monotonic()
            chaos = _Run(options, plan, cluster, pool, checker, report, folder, say)
            await chaos.all(began_s + 60.0 * options.minutes)
        killed = await cluster.stop(_STOP_S)
        checker.check("all end when they are told to", not killed, f"{killed} had to be killed after {_STOP_S:g} s")
    report.minutes = round((time.monotonic() - began_s) / 60.0, 2)
    report.checked = checker.checked
    report.violations = [asdict(one) for one in checker.violations]
    return report


class _Run:
    """One run's rounds."""

    def __init__(
        self,
        options: Options,
        plan: Plan,
        cluster: seats.Cluster,
        pool: Pool,
        checker: Checker,
        report: Report,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._plan = plan
        self._cluster = cluster
        self._pool = pool
        self._checker = checker
        self._report = report
        self._say = say
        self._pulse = Pulse()
        self._clients = Clients(cluster.frontends, pool, self._pulse)
        self._saboteur = Saboteur(cluster, checker, plan, isolated=report.isolated)
        self._quiet = QuietPoints(cluster, checker, folder)
        self._books = Books(cluster, checker)

    async def all(self, end_s: float) -> None:
        beating = asyncio.create_task(self._pulse.beat(), name="pulse")
        try:
            await self._books.open()
            for one in self._plan.rounds:
                if time.monotonic() >= end_s and one.number > 1:
                    break
                self._checker.round = one.number
                violations = len(self._checker.violations)
                whole = await self._round(one)
                self._report.rounds += 1
                if not whole or (len(self._checker.violations) > violations and not self._options.keep_going):
                    break
        finally:
            beating.cancel()
            await self._clients.close()
        self._report.starved_s = round(self._pulse.lost_s, 1)
        self._quiet.check_slopes()
        report = self._report
        report.memory = self._quiet.slopes()
        report.slowest_quiet_s = round(self._quiet.slowest_s, 2)
        report.quiet_points = self._quiet.points
        report.faults, report.faults_skipped = self._saboteur.done, self._saboteur.skipped
        report.slowest_recovery_s = self._saboteur.slowest_recovery_s

    async def _round(self, one: Round) -> bool:
        """False when the cluster is not whole afterwards."""
        began_s = time.monotonic()
        asked: list[tuple[PlannedRequest, list[Try]]] = [(planned, []) for planned in one.requests]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._saboteur.run(one, began_s), name="faults")
            for planned, tries in asked:
                group.create_task(self._ask(planned, tries, began_s), name=f"request {planned.number}")
        for planned, tries in asked:
            judge.judge(planned, tries, self._pool, self._checker, self._report.requests, self._report.excused)
        self._note(asked)
        await self._clients.close()
        whole = await self._quiet.look()
        if whole:
            await self._books.close(one, asked)
            await self._books.open()
        ends = Counter(tries[-1].outcome for _, tries in asked if tries)
        self._say(
            f"round {one.number} ({one.kind}): {len(asked)} requests, "
            f"{', '.join(f'{count} {name}' for name, count in ends.most_common())}; "
            f"{len(one.faults)} faults; {time.monotonic() - began_s:.0f} s; "
            f"{len(self._checker.violations)} violations so far"
        )
        return whole

    async def _ask(self, planned: PlannedRequest, tries: list[Try], began_s: float) -> None:
        await asyncio.sleep(max(0.0, began_s + planned.at_s - time.monotonic()))
        await self._clients.ask(planned, tries)
        if tries[-1].outcome == "hung":  # while it still hangs
            await dump_stacks(self._cluster, [seat.name for seat in self._cluster.seats])

    def _note(self, asked: list[tuple[PlannedRequest, list[Try]]]) -> None:
        report = self._report
        for planned, tries in asked:
            report.tries.update(attempt.outcome for attempt in tries)
            for attempt in tries:
                report.tokens_compared += len(attempt.token_ids) or (attempt.completion_tokens or 0)
                if planned.read_pause_s:
                    continue  # it is its client that takes its time
                report.slowest_request_s = max(report.slowest_request_s, round(attempt.ended_s - attempt.began_s, 2))


def run_in_process(options: Options, *, timeout_s: float | None = None) -> dict[str, Any]:
    """`run` in a process of its own, isolated where that is possible; returns the report as JSON would have it.

    Raises:
        AssertionError: it ended without a report.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "report.json"
        argv = [sys.executable, "-m", "tests.faults.chaos", "--seed", str(options.seed), "--json", str(out)]
        argv += ["--minutes", str(options.minutes), "--engine", options.engine, "--prefill", str(options.prefill)]
        argv += ["--decode", str(options.decode), "--frontends", str(options.frontends)]
        argv += ["--rate", str(options.rate)] if options.rate is not None else []
        argv += ["--keep-going"] if options.keep_going else []
        argv += ["--folder", str(options.folder)] if options.folder is not None else []
        root = str(Path(__file__).parents[3])
        done = subprocess.run(
            argv, cwd=root, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=timeout_s
        )
        if not out.exists():
            raise AssertionError(f"the chaos run ended with {done.returncode}:\n{done.stdout}{done.stderr}"[-6000:])
        found: dict[str, Any] = json.loads(out.read_text())
        return found
