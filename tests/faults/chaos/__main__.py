"""The command: see the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from tests.faults.chaos import isolation, plan
from tests.faults.chaos.run import Options, Report, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description="Faults under load, by a seed.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--engine", choices=("simulated", "vllm"), default="simulated")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--frontends", type=int, default=2)
    parser.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument("--keep-going", action="store_true", help="begin further rounds after a violation")
    parser.add_argument("--only-plan", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--folder", type=Path, help="for the logs; a new temporary one when absent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    args = parser.parse_args()
    options = Options(
        seed=args.seed,
        minutes=args.minutes,
        engine=args.engine,
        prefill=args.prefill,
        decode=args.decode,
        frontends=args.frontends,
        rate=args.rate,
        keep_going=args.keep_going,
        folder=args.folder,
    )
    if args.only_plan:
        say("\n".join(plan.lines(options.plan())))
        return
    isolation.enter()
    report = asyncio.run(run(options, say))
    say(summary(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    sys.exit(1 if report.violations else 0)


def summary(report: Report) -> str:
    """The figures of a run, in lines."""

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda one: -one[1]))

    lines = [
        f"seed {report.seed}, {report.engine}: {report.minutes:g} minutes, {report.rounds} rounds, "
        f"{sum(report.requests.values())} requests, {sum(report.faults.values())} faults, "
        f"{sum(report.checked.values())} checks, {len(report.violations)} violations",
        f"  requests: {listed(report.requests)}",
        f"  tries:    {listed(report.tries)}",
        f"  faults:   {listed(report.faults)}",
        f"  skipped:  {listed(report.faults_skipped) or 'none'}",
        f"  excused:  {listed(report.excused) or 'none'}",
        f"  checked:  {listed(report.checked)}",
        f"  slowest:  request {report.slowest_request_s:g} s, all free again {report.slowest_quiet_s:g} s after the "
        f"load, back after {report.slowest_recovery_s}; no processor for {report.starved_s:g} s",
        *(f"  memory:   {one}" for one in report.memory),
        *(f"  VIOLATION {one['invariant']}: {one['detail']} (round {one['round']})" for one in report.violations),
        f"  logs in {report.folder}",
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
