"""`python -m tests.fuzz [--target NAME] [--runs N] [--seconds S] [--seed S] [--json FILE]`: see the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tests.fuzz.campaign import run

NAMES = ("requests", "answers", "block-protocol", "events", "traces")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz what reads others' bytes.")
    parser.add_argument("--target", choices=NAMES, action="append", help="one of them; all when none is named")
    parser.add_argument("--runs", type=int, default=0, help="inputs of each target")
    parser.add_argument("--seconds", type=float, default=0.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write a report to this file")
    asked = parser.parse_args()
    names = asked.target or NAMES
    runs = asked.runs or (0 if asked.seconds else 20_000)
    outcomes = run(names, runs=runs, seconds=asked.seconds / len(names), seed=asked.seed)
    for one in outcomes:
        line = f"{one.name:16} {one.inputs:>10} inputs  {one.coverage:>5} branches  {one.crashes} crashes"
        sys.stdout.write(f"{line}\n{one.finding}\n" if one.finding else f"{line}\n")
    report = {"seed": asked.seed, "targets": [dataclasses.asdict(one) for one in outcomes]}
    if asked.json is not None:
        asked.json.write_text(json.dumps(report, indent=2))
    return int(any(one.crashes for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
