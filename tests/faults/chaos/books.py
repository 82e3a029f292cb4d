"""The books: what clients sent, what frontends wrote down, and what workers counted have to agree."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.faults.chaos.checker import Checker
from tests.faults.chaos.clients import Try
from tests.faults.chaos.plan import Group, PlannedRequest, Round
from tests.faults.chaos.quiet import ENDPOINTS, metrics_url
from tests.faults.chaos.scraping import Page, page
from tests.faults.chaos.seats import Cluster, Seat

_LINES_S = 8.0
"""Longest until a request's line is written: it is, as soon as its frontend has noticed its end."""
_MADE = re.compile(r"-[0-9a-f]{8}$")
_OUTCOMES = ("taken", "released", "expired", "aborted")
_FACE = "slipstream_frontend_requests_total"
_TOKENS = "slipstream_frontend_completion_tokens_total"


@dataclass(slots=True)
class _Log:
    """An access log, read as far as it goes."""

    offset: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read(self, seat: Seat) -> None:
        file = seat.settings.log.access_log
        assert file is not None
        if not file.exists():
            return
        with file.open("rb") as log:
            log.seek(self.offset)
            content = log.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.lines += [json.loads(line) for line in whole.splitlines()]


class Books:
    """Compared at each quiet point, for the round before it."""

    def __init__(self, cluster: Cluster, checker: Checker) -> None:
        self._cluster = cluster
        self._checker = checker
        self._logs: dict[str, _Log] = {}
        self._before: dict[str, tuple[int, Page]] = {}
        self.statuses: Counter[str] = Counter()

    async def open(self) -> None:
        """Note where everything stands, before a round."""
        for seat in self._cluster.frontends:
            log = self._logs.setdefault(seat.name, _Log())
            log.read(seat)
            log.lines.clear()
        self._before = {}
        for seat in self._cluster.seats:
            figures = await asyncio.to_thread(page, metrics_url(seat))
            if figures is not None:
                self._before[seat.name] = (seat.starts, figures)

    async def close(self, one: Round, requests: list[tuple[PlannedRequest, list[Try]]]) -> None:
        """Compare, after a round. Everything has ended by now, and all clients have closed their connections."""
        tries = {attempt.name: (planned, attempt) for planned, mine in requests for attempt in mine}
        end_s = time.monotonic() + _LINES_S
        while True:
            for seat in self._cluster.frontends:
                self._logs[seat.name].read(seat)
            lacking = self._lacking(tries)
            if not lacking or time.monotonic() > end_s:
                break
            await asyncio.sleep(0.2)
        self._checker.check("no request is lost", not lacking, f"no line in the access log of {lacking[:10]}")
        self._compare_lines(tries)
        await self._compare_figures(one)

    # -- clients and access logs --------------------------------------------------------------------------

    def _written(self) -> Counter[str]:
        return Counter(_MADE.sub("", line["request_id"]) for log in self._logs.values() for line in log.lines)

    def _lacking(self, tries: dict[str, tuple[PlannedRequest, Try]]) -> list[str]:
        """Tries that a frontend has answered, and has written nothing of. One that was killed may not have come to it,
        and a request whose client left, or whose connection broke, may never have been received."""
        written = self._written()
        return [
            f"{name} ({attempt.outcome} by {attempt.frontend.name})"
            for name, (_, attempt) in tries.items()
            if not written[name] and attempt.outcome not in ("left", "cut", "malformed") and not _broken(attempt)
        ]

    def _compare_lines(self, tries: dict[str, tuple[PlannedRequest, Try]]) -> None:
        written = self._written()
        doubled = [name for name, count in written.items() if count > 1]
        self._checker.check("no request is doubled", not doubled, f"several lines in access logs of {doubled[:10]}")
        unknown = [name for name in written if name not in tries]
        self._checker.check("no request is made up", not unknown, f"lines of what nobody sent: {unknown[:10]}")
        for log in self._logs.values():
            for line in log.lines:
                self.statuses[line["status"]] += 1
                found = tries.get(_MADE.sub("", line["request_id"]))
                if found is not None:
                    self._compare_line(line, *found)

    def _compare_line(self, line: dict[str, Any], planned: PlannedRequest, attempt: Try) -> None:
        name, status = attempt.name, line["status"]
        if attempt.outcome == "answered":
            same = status in ("200", "OK") and not line.get("error")
            self._checker.check("client and access log agree", same, f"{name} was answered, its line says {line}")
            if attempt.completion_tokens is not None:
                told = line["output_length"]
                self._checker.check(
                    "client and access log agree",
                    told == attempt.completion_tokens,
                    f"{name}: its usage says {attempt.completion_tokens} tokens, its line {told}",
                )
        elif attempt.status not in (0, 200):
            # Who left with the status, and did not read on, knows that there was an error, and not which.
            same = bool(line.get("error")) if attempt.outcome == "left" else line.get("error") == attempt.outcome
            self._checker.check(
                "client and access log agree",
                same,
                f"{name} was told {attempt.status} {attempt.outcome}, its line says {line}",
            )

    # -- figures ------------------------------------------------------------------------------------------

    async def _compare_figures(self, one: Round) -> None:
        after = {seat.name: await asyncio.to_thread(page, metrics_url(seat)) for seat in self._cluster.seats}
        lived = {
            seat.name: (self._before[seat.name][1], figures)
            for seat in self._cluster.seats
            if (figures := after[seat.name]) is not None
            and seat.name in self._before
            and self._before[seat.name][0] == seat.starts
        }
        members_killed = any(fault.kind == "kill_member" for fault in one.faults)
        for seat in self._cluster.frontends:
            if seat.name in lived and not (members_killed and seat.settings.frontend.workers > 1):
                self._compare_face(seat, *lived[seat.name])
        for seat in self._cluster.workers:
            figures = after[seat.name]
            if figures is not None:
                self._compare_leases(seat, figures)
        if one.kind == "calm" and all(seat.name in lived for seat in self._cluster.workers):
            self._compare_transfers(lived)

    def _compare_face(self, seat: Seat, before: Page, after: Page) -> None:
        lines = self._logs[seat.name].lines
        counted = sum(
            after.total(_FACE, endpoint=endpoint) - before.total(_FACE, endpoint=endpoint) for endpoint in ENDPOINTS
        )
        self._checker.check(
            "access log and metrics agree",
            counted == len(lines),
            f"{seat.name} counts {counted:g} requests and has written {len(lines)} lines",
        )
        tokens = after.total(_TOKENS) - before.total(_TOKENS)
        written = sum(line["output_length"] for line in lines)
        self._checker.check(
            "access log and metrics agree",
            tokens == written,
            f"{seat.name} counts {tokens:g} tokens, its lines have {written}",
        )

    def _compare_leases(self, seat: Seat, figures: Page) -> None:
        opened = figures.total("slipstream_kv_handoffs_opened_total")
        ended = {name: figures.total("slipstream_kv_handoffs_total", outcome=name) for name in _OUTCOMES}
        held = figures.total("slipstream_kv_handoffs_held")
        self._checker.check(
            "leases that began have ended",
            opened == sum(ended.values()) + held,
            f"{seat.name}: {opened:g} began, {ended} ended, {held:g} are held",
        )

    def _compare_transfers(self, lived: dict[str, tuple[Page, Page]]) -> None:
        """What was sent was received: in a round in which nothing was done to anybody."""

        def grown(seat: Seat, name: str, **labels: str) -> float:
            before, after = lived[seat.name]
            return after.total(name, **labels) - before.total(name, **labels)

        workers = self._cluster.workers
        taken = sum(grown(seat, "slipstream_kv_handoffs_total", outcome="taken") for seat in workers)
        done = sum(grown(seat, "slipstream_kv_transfers_total", result="done") for seat in workers)
        # A lease may be given up, by a client that leaves, in the moment in which the last block has come: after its
        # sender's engine had noticed that the prompt is computed (released), or before (aborted).
        ways = ("released", "aborted")
        spare = sum(grown(seat, "slipstream_kv_handoffs_total", outcome=way) for seat in workers for way in ways)
        self._checker.check(
            "what was sent was received",
            taken <= done <= taken + spare,
            f"{taken:g} handoffs were taken, {spare:g} given up, {done:g} transfers are done",
        )
        tokens = sum(grown(seat, "slipstream_worker_tokens_total") for seat in self._cluster.of(Group.DECODE))
        written = sum(line["output_length"] for log in self._logs.values() for line in log.lines)
        self._checker.check(
            "clients got no more than was generated",
            tokens >= written,
            f"{written} tokens were sent to clients, {tokens:g} were generated",
        )


def _broken(attempt: Try) -> bool:
    """Whether the process that it went to was killed: it has perhaps not come to writing a line."""
    seat = attempt.frontend
    killed = any(why in ("kill", "kill_member") for number, why in seat.ends.items() if number >= attempt.start)
    return killed or seat.settings.frontend.workers > 1
