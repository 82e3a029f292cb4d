"""Runs one case after another on one cluster, and judges each: right tokens, typed errors, nothing kept, no hang."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

import psutil

from frontend.dispatch import ClusterDispatcher, open_dispatcher
from frontend.generation import TokenRequest
from kv_transfer.board import Board, Counter
from slipstream.errors import DeadlineError as RequestDeadlineError
from slipstream.errors import SlipstreamError, UnavailableError
from slipstream.v1.registry_pb2 import WorkerState
from slipstream.v1.sampling_pb2 import RequestAccount, SamplingParams
from tests.faults.fuzz_cases import Case, Fault, Kind, Planned, Stage
from tests.faults.fuzz_faults import inflict
from tests.support.fault_cluster import FaultCluster, Member, kept_by

# Longer than all limits of the frontend's settings together: what takes longer is a hang.
HANG_S = 75.0
READY_S = 120.0
QUIET_S = 15.0
_STAGE_S = 1.5
_POLL_S = 0.002
_COUNTED = ("HANDOFFS_", "FAILED_", "SPANS_", "TRANSFERS_", "PREEMPTIONS")
_GROWTH = {"files": 24, "threads": 12, "rss_mib": 128}


@dataclass(slots=True)
class Report:
    """What has happened in all cases so far."""

    cases: int = 0
    requests: int = 0
    faults: Tally[str] = field(default_factory=Tally)
    ends: Tally[str] = field(default_factory=Tally)
    accounts: Tally[str] = field(default_factory=Tally)
    boards: dict[str, dict[str, int]] = field(default_factory=dict)
    slowest_quiet_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def counters(self) -> Tally[str]:
        """Sums of the engines' own counters."""
        total: Tally[str] = Tally()
        for counted in self.boards.values():
            total.update({name: value for name, value in counted.items() if value})
        return total


@dataclass(slots=True)
class _Progress:
    """How far the requests of a case are."""

    boards: list[Board]
    opened: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.opened = self._sum(Counter.HANDOFFS_OPENED)

    def _sum(self, counter: Counter) -> int:
        return sum(board.counter(counter) for board in self.boards)

    def reached(self, stage: Stage) -> bool:
        if stage is Stage.STREAMING:
            return self._sum(Counter.HANDOFFS_OPENED) > self.opened
        if stage is Stage.HELD:
            return self._sum(Counter.HANDOFFS_HELD) > 0
        if stage is Stage.DECODING:
            return self.tokens > 0
        return True

    async def until(self, stage: Stage) -> None:
        """Wait for the stage, but not for ever: it may have passed, or never come."""
        end_s = time.monotonic() + _STAGE_S
        while not self.reached(stage) and time.monotonic() < end_s:  # noqa: ASYNC110 - shared memory: no event
            await asyncio.sleep(_POLL_S)
        if stage is Stage.OPENED:
            await asyncio.sleep(0.01)


class Fuzzer:
    """Args:
    pool: prompts and their right answers.
    say: takes lines about the progress.
    """

    def __init__(
        self,
        cluster: FaultCluster,
        dispatcher: ClusterDispatcher,
        pool: Sequence[tuple[list[int], list[int]]],
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._dispatcher = dispatcher
        self._pool = pool
        self._say = say
        self._ending: dict[int, int] = {}  # by member, its starts when it was given the end
        self._sizes: dict[int, dict[str, float]] = {}
        self.report = Report()

    async def run(self, case: Case, seed: int) -> list[str]:
        """What was wrong with this case; nothing, if all is well."""
        wrong: list[str] = []
        await self._ready()
        with ExitStack() as stack:
            boards = [board for member in self._cluster.members if (board := member.board()) is not None]
            for board in boards:
                stack.callback(board.close)
            progress = _Progress(boards)
            rng = random.Random(f"{seed}:{case.number}:faults")
            async with asyncio.TaskGroup() as group:
                for number, planned in enumerate(case.requests):
                    name = f"{seed}-{case.number}-{number}"
                    group.create_task(self._request(name, planned, case, progress, wrong))
                for fault in case.faults:
                    group.create_task(self._fault(fault, progress, rng))
        wrong += await self._quiet()
        self._ending.clear()
        self._note_counters()
        self.report.cases += 1
        self.report.failures += [f"{case.title}: {line}" for line in wrong]
        return wrong

    # -- the parts of a case ------------------------------------------------------------------------------

    async def _fault(self, fault: Fault, progress: _Progress, rng: random.Random) -> None:
        await progress.until(fault.stage)
        await asyncio.sleep(fault.delay_s)
        self.report.faults[f"{fault.kind} {self._cluster.members[fault.member].kind} {fault.stage}"] += 1
        member = self._cluster.members[fault.member]
        starts = member.starts
        if await inflict(fault, self._cluster, rng):
            self._ending.setdefault(fault.member, starts)

    async def _request(self, name: str, planned: Planned, case: Case, progress: _Progress, wrong: list[str]) -> None:
        await asyncio.sleep(planned.delay_s)
        prompt, right = self._pool[planned.which]
        tokens: list[int] = []
        self.report.requests += 1
        asking = asyncio.create_task(self._ask(name, prompt, planned.max_tokens, tokens, progress))
        leaving = asyncio.create_task(self._leave(planned, progress))
        try:
            await asyncio.wait({asking, leaving}, timeout=HANG_S, return_when=asyncio.FIRST_COMPLETED)
            end = await self._end(asking, abandoned=leaving.done())
        finally:
            leaving.cancel()
            asking.cancel()
        self.report.ends[end] += 1
        if tokens != right[: len(tokens)] or (end == "answered" and len(tokens) != planned.max_tokens):
            at = next((n for n, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), len(tokens))
            wrong.append(
                f"request {name} ({end}): WRONG TOKEN at {at} of {len(tokens)}, prompt {planned.which}{_told(asking)}"
            )
        if end == "hung":
            wrong.append(f"request {name} HUNG for {HANG_S:g} s after {len(tokens)} tokens")
        if end.startswith("error") and not (end.startswith("error typed") and _may_fail(case, self._cluster.members)):
            wrong.append(f"request {name}: {end}")

    async def _ask(
        self, name: str, prompt: list[int], max_tokens: int, tokens: list[int], progress: _Progress
    ) -> RequestAccount | None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        account = None
        request = TokenRequest(name, "tiny", prompt, sampling)
        async with aclosing(self._dispatcher.generate(request)) as answer:
            async for delta in answer:
                tokens.extend(delta.token_ids)
                progress.tokens += len(delta.token_ids)
                account = delta.account or account
        return account

    async def _leave(self, planned: Planned, progress: _Progress) -> None:
        if planned.gives_up is None:
            await asyncio.Event().wait()
            return
        stage, after_s = planned.gives_up
        await progress.until(stage)
        await asyncio.sleep(after_s)

    async def _end(self, asking: asyncio.Task[RequestAccount | None], *, abandoned: bool) -> str:
        """How a request ended, in a word."""
        if not asking.done():
            asking.cancel()
            await asyncio.wait({asking}, timeout=5.0)
            return "abandoned" if abandoned and asking.done() else "hung"
        try:
            account = asking.result()
        except (UnavailableError, RequestDeadlineError) as error:
            return f"error typed {error.code}"
        except SlipstreamError as error:
            return f"error untyped {type(error).__name__} {error.code}: {error.message}"
        except Exception as error:
            return f"error {type(error).__name__}: {error}"
        if account is not None:
            self._note_account(account)
        return "answered"

    def _note_account(self, account: RequestAccount) -> None:
        noted = self.report.accounts
        noted["with blocks from prefill"] += bool(account.kv_blocks_moved)
        noted["spans resent"] += account.kv_spans_resent
        noted["dispatched again"] += account.attempts > 1
        if account.fallback:
            noted[f"recomputed: {account.fallback}"] += 1

    # -- before and after ---------------------------------------------------------------------------------

    async def _ready(self) -> None:
        """Until every worker takes requests, as far as the dispatcher knows."""
        end_s = time.monotonic() + READY_S
        soon_s = time.monotonic() + 8.0
        while True:
            self._cluster.revive()
            states = await asyncio.gather(*(member.status() for member in self._cluster.members))
            up = [record is not None and record.state == WorkerState.READY for record in states]
            known = sum(one.prefill_workers + one.decode_workers for one in self._dispatcher.models())
            up += [self._cluster.members[index].starts > starts for index, starts in self._ending.items()]
            if all(up) and (known == len(states) or (known and time.monotonic() > soon_s)):
                return
            if time.monotonic() > end_s:
                raise AssertionError(f"not all workers came back in {READY_S:g} s: {up}, {known} known")
            await asyncio.sleep(0.05)

    async def _quiet(self) -> list[str]:
        """After all requests have ended: nothing is kept by anybody."""
        await self._ready()
        began_s = time.monotonic()
        while True:
            kept = await kept_by(self._cluster.members)
            took_s = time.monotonic() - began_s
            if not kept or took_s > QUIET_S:
                self.report.slowest_quiet_s = max(self.report.slowest_quiet_s, took_s)
                return kept
            await asyncio.sleep(0.05)

    def check_growth(self) -> list[str]:
        """What has grown in processes that were there at the last check too; resources of new ones are noted."""
        grown = []
        before, self._sizes = self._sizes, {}
        for name, pid in self._processes():
            try:
                size = _size(psutil.Process(pid))
            except psutil.Error:
                continue
            first = before.get(pid, size)
            self._sizes[pid] = first
            grown += [
                f"{name} has GROWN from {first[what]:g} to {size[what]:g} {what}"
                for what, limit in _GROWTH.items()
                if size[what] > first[what] + limit
            ]
        return grown

    def _processes(self) -> list[tuple[str, int]]:
        found = [("the fuzzer with its frontend", os.getpid())]
        for member in self._cluster.members:
            found.append((member.name, member.service_pid))
            engine_pid = member.engine_pid()
            if engine_pid is not None:
                found.append((f"{member.name}'s engine", engine_pid))
        return found

    def _note_counters(self) -> None:
        for member in self._cluster.members:
            board = member.board()
            if board is not None:
                names = [one for one in Counter if one.name.startswith(_COUNTED)]
                self.report.boards[board.path.name] = {
                    one.name.lower(): board.counter(one) for one in names if one is not Counter.HANDOFFS_HELD
                }
                board.close()


@asynccontextmanager
async def fuzzer(
    cluster: FaultCluster, pool: Sequence[tuple[list[int], list[int]]], say: Callable[[str], None]
) -> AsyncIterator[Fuzzer]:
    """A fuzzer on a running cluster, with a dispatcher of its own."""
    async with open_dispatcher(cluster.settings) as dispatcher:
        yield Fuzzer(cluster, dispatcher, pool, say)


def _may_fail(case: Case, members: Sequence[Member]) -> bool:
    """Whether a request of this case may end with a typed error: a decode worker was taken away from it."""
    harmless = (Kind.NOTHING, Kind.GARBAGE, Kind.FLIP, Kind.CUT, Kind.LOSE_PLANE)
    return any(fault.kind not in harmless and members[fault.member].kind == "decode" for fault in case.faults)


def _told(asking: asyncio.Task[RequestAccount | None]) -> str:
    """What an answer's account says of its way."""
    if not asking.done() or asking.cancelled() or asking.exception() is not None:
        return ""
    account = asking.result()
    return f" [{' '.join(str(account).split())}]" if account is not None else ""


def _size(process: psutil.Process) -> dict[str, float]:
    return {
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "rss_mib": round(process.memory_info().rss / (1 << 20), 1),
    }
