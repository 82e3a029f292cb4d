"""The fault table: every case run with real workers, compared with its promise, and written to docs/faults.md.

    python -m tests.faults.table                     # every case; writes tests/faults/measured.json and docs/faults.md
    python -m tests.faults.table --short             # the selection that runs with the tests; writes nothing
    python -m tests.faults.table --only kill-decode-engine --only frontend-killed
    python -m tests.faults.table --only rolling-restart --save   # this row of the page anew
    python -m tests.faults.table --docs              # docs/faults.md again, from what was measured last
    python -m tests.faults.table --json FILE         # the figures, with sums, to this file

`run` is the same for other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tests.faults import (
    clock_cases,
    disk_cases,
    faults_page,
    frontend_cases,
    memory_cases,
    model_cases,
    network_cases,
    process_cases,
)
from tests.faults.arena import Arena, opened
from tests.faults.case import Case, Measured, broken
from tests.faults.load import loading

CASES: tuple[Case, ...] = (
    *process_cases.CASES,
    *network_cases.CASES,
    *frontend_cases.CASES,
    *memory_cases.CASES,
    *model_cases.CASES,
    *disk_cases.CASES,
    *clock_cases.CASES,
)
RESULTS = Path(__file__).with_name("measured.json")
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.md"


class Result(msgspec.Struct, kw_only=True):
    """A row as it was measured.

    Attributes:
        skipped: why it was not.
        broken: what was promised and did not hold.
    """

    name: str
    measured: Measured | None = None
    skipped: str = ""
    broken: list[str] = []
    took_s: float = 0.0


class Table(msgspec.Struct, kw_only=True):
    """All rows of a run."""

    seed: int
    results: list[Result] = []

    def counts(self) -> dict[str, int]:
        """Sums, for who reports them."""
        ran = [one for one in self.results if one.measured is not None]
        sums = {
            name: sum(getattr(one.measured, name) for one in ran)
            for name in ("requests", "answered", "lost", "wrong", "untyped", "hung", "moved")
        }
        return {
            "cases": len(ran),
            "kept_their_promise": sum(not one.broken for one in ran),
            "skipped": len(self.results) - len(ran),
            **sums,
            "left_held": sum(len(one.measured.kept) for one in ran if one.measured is not None),
        }


def chosen(*, short: bool = False, only: Sequence[str] = ()) -> list[Case]:
    """The cases of that selection, in the table's order.

    Raises:
        ValueError: a name that no case has.
    """
    unknown = set(only) - {case.name for case in CASES}
    if unknown:
        raise ValueError(f"no case is called {', '.join(sorted(unknown))}")
    return [case for case in CASES if (case.name in only if only else case.short or not short)]


def run(
    *,
    folder: Path,
    seed: int = 1,
    short: bool = False,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[Table], None] = lambda table: None,
) -> Table:
    """Run cases, one after another, in one cluster.

    Args:
        folder: for logs and the tiny model.
        short: those alone that run with the tests.
        only: names of cases; all when empty.
        say: takes a line about each.
        keep: takes the table as it is after each.
    """
    return asyncio.run(_run(chosen(short=short, only=only), folder, seed, say, keep))


async def _run(
    cases: list[Case], folder: Path, seed: int, say: Callable[[str], None], keep: Callable[[Table], None]
) -> Table:
    table = Table(seed=seed)
    runnable = []
    for case in cases:
        reason = case.why_not()
        if reason:
            table.results.append(Result(name=case.name, skipped=reason))
            say(f"{case.name}: skipped, {reason}")
        else:
            runnable.append(case)
    if not runnable:
        return table
    async with opened(folder, seed=seed) as arena:
        for case in runnable:
            result = await _one(case, arena, seed)
            table.results.append(result)
            say(f"{case.name}: {'; '.join(result.broken) or 'ok'} ({told(result)})")
            keep(table)
    return table


async def _one(case: Case, arena: Arena, seed: int) -> Result:
    began_s = time.monotonic()
    measured = Measured()
    try:
        await arena.whole()
        measured = await _measured(case, arena, seed)
        await arena.whole()
        measured.quiet_s, measured.kept = await arena.quiet()
    except (AssertionError, TimeoutError) as error:
        measured.broken.append(f"{type(error).__name__} {error} ({_place(error)})")
    result = Result(name=case.name, measured=measured, took_s=round(time.monotonic() - began_s, 1))
    result.broken = broken(case.promise, measured)
    measured.silence_s, measured.quiet_s = round(measured.silence_s, 2), round(measured.quiet_s, 2)
    return result


async def _measured(case: Case, arena: Arena, seed: int) -> Measured:
    if case.alone is not None:
        return await case.alone(arena)
    assert case.inflict is not None, "a case does something"
    async with loading([arena.target], arena.pool, case.stream, seed=seed) as load:
        try:
            await case.inflict(arena, load)
        except (AssertionError, TimeoutError) as error:
            load.measured.broken.append(f"{type(error).__name__} {error} ({_place(error)})")
    return load.measured


def _place(error: BaseException) -> str:
    """Where it came from, as far as that is in the suite."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def told(result: Result) -> str:
    """A row's figures, in a line."""
    measured = result.measured
    if measured is None:
        return result.skipped
    figures = "".join(f", {name} {value:g}" for name, value in measured.figures.items())
    codes = "".join(f" {code} x{count}" for code, count in measured.codes.items())
    return (
        f"{measured.requests} requests, {measured.lost} lost{codes}, {measured.wrong} wrong, {measured.moved} moved, "
        f"longest wait {measured.silence_s:.1f} s, free after {measured.quiet_s:.1f} s{figures}, {result.took_s:.0f} s"
    )


def merged(before: Table | None, now: Table) -> Table:
    """Rows measured now, and those of an earlier run for the rest; in the table's order, without rows of no case."""
    found = {one.name: one for one in (before.results if before else [])}
    found.update({one.name: one for one in now.results if one.measured is not None or one.name not in found})
    return Table(seed=now.seed, results=[found[case.name] for case in CASES if case.name in found])


def read_results() -> Table | None:
    """What was measured last; None when nothing was."""
    return msgspec.json.decode(RESULTS.read_bytes(), type=Table) if RESULTS.exists() else None


def page() -> str:
    """docs/faults.md as it has to be."""
    table = read_results()
    return faults_page.page(CASES, {one.name: one for one in table.results} if table else {})


def main() -> None:
    parser = argparse.ArgumentParser(description="Break a real cluster in every way of the table, and compare.")
    parser.add_argument("--short", action="store_true", help="the selection that runs with the tests")
    parser.add_argument("--only", action="append", default=[], help="this case; may be repeated")
    parser.add_argument("--save", action="store_true", help="put what `--only` measures into the page, too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write figures and sums to this file")
    parser.add_argument("--docs", action="store_true", help="write docs/faults.md from what was measured last, and end")
    parser.add_argument("--folder", type=Path, help="for the logs; a new temporary one when absent")
    parser.add_argument("--list", action="store_true", help="list the cases, and end")
    args = parser.parse_args()
    if args.list:
        sys.stdout.writelines(f"{case.name:32} {case.fault}: {case.what}\n" for case in CASES)
        return
    if args.docs:
        PAGE.write_text(page())
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="slipstream-faults-"))
    saved = args.save or not (args.short or args.only)
    keep = _save if saved else lambda table: None
    table = run(folder=folder, seed=args.seed, short=args.short, only=args.only, say=_say, keep=keep)
    _say(f"logs in {folder}; {', '.join(f'{count} {name}' for name, count in table.counts().items())}")
    if args.json:
        figures = {"counts": table.counts(), **msgspec.to_builtins(table)}
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures)) + b"\n")
    if saved:
        _save(table)
    sys.exit(1 if any(one.broken for one in table.results) else 0)


def _save(table: Table) -> None:
    """After each case: a run that is broken off has measured something."""
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(merged(read_results(), table))) + b"\n")
    PAGE.write_text(page())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
