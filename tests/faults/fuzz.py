"""Fault fuzzer: random faults in a real cluster, and after each the question whether anything is wrong, held or stuck.

    python -m tests.faults.fuzz --cases 1000 --seed 7
    python -m tests.faults.fuzz --seed 7 --only 123        # one case again

Real workers and a real control plane run the tiny model; a real dispatcher sends them requests. Each case kills, stops,
cuts, floods or falsifies something while requests are under way (`fuzz_cases` lists what, `fuzz_faults` does it). Every
answer must be, token for token, what a plain engine says; every request must end in time; and afterwards all blocks of
all workers must be free.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from tests.faults import fuzz_cases
from tests.faults.fuzz_cases import MAX_TOKENS, Case, Kind
from tests.faults.fuzz_run import Report, fuzzer
from tests.support import warm_processes
from tests.support.clear_answers import clear_answers
from tests.support.fault_cluster import FaultCluster, running
from tests.support.tiny_model import VOCAB_SIZE, make_tiny_model

Mode = Literal["direct", "staged"]

_PROMPTS = 40
_GROWTH_EVERY = 20


def make_prompts(seed: int) -> list[list[int]]:
    """Families with shared beginnings, from shorter than a block to most of a context."""
    rng = random.Random(f"{seed}:prompts")
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((40, 64, 200, 500)))] for _ in range(5)]
    return [
        rng.choice(stems) + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 400))]
        for _ in range(_PROMPTS)
    ]


def make_pool(model: Path, seed: int, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and what a plain engine answers to them."""
    return clear_answers(model, make_prompts(seed), MAX_TOKENS, folder)


def run(
    *,
    seed: int,
    numbers: list[int],
    mode: Mode,
    folder: Path,
    prefill: int = 1,
    decode: int = 2,
    keep_going: bool = False,
    limit_s: float | None = None,
    only: Kind | None = None,
) -> Report:
    """Run these cases; stops at the first that fails unless `keep_going`, and in any case after `limit_s`."""
    began_s = time.monotonic()
    warm_processes.start_fork_server()
    model = folder / "tiny"
    make_tiny_model(model)
    pool = make_pool(model, seed, folder)
    say(f"{len(pool)} prompts, plain answers after {time.monotonic() - began_s:.0f} s; logs in {folder}")
    left = [
        fuzz_cases.draw(seed, number, prompts=len(pool), members=prefill + decode, landing=mode == "staged", only=only)
        for number in numbers
    ]
    report = Report()
    end_s = time.monotonic() + limit_s if limit_s is not None else float("inf")
    while left and time.monotonic() < end_s:
        with running(model, folder, prefill=prefill, decode=decode, mode=mode) as cluster:
            asyncio.run(_some(cluster, pool, left, seed, report, end_s))
        if report.failures and not keep_going:
            break
    say(summary(report, seed, mode, time.monotonic() - began_s))
    return report


async def _some(
    cluster: FaultCluster,
    pool: list[tuple[list[int], list[int]]],
    left: list[Case],
    seed: int,
    report: Report,
    end_s: float,
) -> None:
    """Cases until one fails: the next begin with a new cluster."""
    async with fuzzer(cluster, pool, say) as fuzz:
        fuzz.report = report
        while left and time.monotonic() < end_s:
            case = left.pop(0)
            began_s = time.monotonic()
            try:
                wrong = await fuzz.run(case, seed)
            except AssertionError as error:
                wrong = [str(error)]
                report.failures.append(f"{case.title}: {error}")
            if report.cases % _GROWTH_EVERY == 0:
                grown = fuzz.check_growth()
                report.failures += grown
                wrong += grown
            say(f"{case.title}: {'; '.join(wrong) or 'ok'} ({time.monotonic() - began_s:.1f} s)")
            if wrong:
                say(f"  FAILED; again with --seed {seed} --only {case.number}")
                return


def summary(report: Report, seed: int, mode: str, elapsed_s: float) -> str:
    """The figures of a run, in lines."""
    by_kind: dict[str, int] = {}
    for name, count in report.faults.items():
        kind = name.split(" ")[0]
        by_kind[kind] = by_kind.get(kind, 0) + count
    lines = [
        f"seed {seed}, shm/{mode}: {report.cases} cases, {report.requests} requests, {elapsed_s:.0f} s, "
        f"{len(report.failures)} failures; all free again at the latest {report.slowest_quiet_s:.1f} s after the end",
        "  faults:   " + ", ".join(f"{count} {name}" for name, count in sorted(by_kind.items())),
        "  requests: " + ", ".join(f"{count} {name}" for name, count in sorted(report.ends.items())),
        "  answers:  " + ", ".join(f"{count} {name}" for name, count in sorted(report.accounts.items()) if count),
        "  engines:  " + ", ".join(f"{count} {name}" for name, count in sorted(report.counters().items())),
        *(f"  FAILED {failure}" for failure in report.failures),
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Inject random faults into a cluster and check what comes of it.")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transport", choices=("shm/direct", "shm/staged"), default="shm/staged")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--keep-going", action="store_true", help="go on, with a new cluster, after a failure")
    parser.add_argument("--limit-s", type=float, help="begin no case after this many seconds")
    parser.add_argument("--kind", choices=[kind.value for kind in Kind], help="draw only this kind of fault")
    parser.add_argument("--folder", type=Path, help="for the logs; a new temporary one when absent")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="slipstream-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [args.only] if args.only is not None else list(range(args.first, args.first + args.cases))
    mode: Mode = "direct" if args.transport == "shm/direct" else "staged"
    report = run(
        seed=args.seed,
        numbers=numbers,
        mode=mode,
        folder=folder,
        prefill=args.prefill,
        decode=args.decode,
        keep_going=args.keep_going,
        limit_s=args.limit_s,
        only=Kind(args.kind) if args.kind else None,
    )
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
