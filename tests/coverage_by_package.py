"""What `make coverage` prints last: for each package the share of lines and branches that ran, and whether it fell.

python -m tests.coverage_by_package, after pytest has left `.coverage` in this folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coverage import Coverage

FLOORS = {
    "slipstream": 83,
    "kv_transfer": 77,
    "engine": 83,
    "prefill_worker": 76,
    "decode_worker": 84,
    "frontend": 90,
    "planner": 94,
    "deploy": 66,
    "simulator": 91,
    "benchmarks": 42,
}
"""Percent, some points below what was measured: less means that something came without tests."""


@dataclass(frozen=True, slots=True)
class Share:
    """Lines and branches of one package."""

    package: str
    there: int
    reached: int

    @property
    def percent(self) -> float:
        return 100 * self.reached / self.there if self.there else 100.0

    @property
    def fell(self) -> bool:
        return self.percent < FLOORS[self.package]


def shares(files: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[Share]:
    """By package, in the order of `FLOORS`.

    Args:
        files: `files` of coverage's JSON report: path -> {"summary": counts}.
    """
    there: dict[str, int] = defaultdict(int)
    reached: dict[str, int] = defaultdict(int)
    for path, report in files.items():
        package, counts = Path(path).parts[0], report["summary"]
        there[package] += counts["num_statements"] + counts["num_branches"]
        reached[package] += counts["covered_lines"] + counts["covered_branches"]
    for package in FLOORS:
        yield Share(package, there[package], reached[package])


def main() -> int:
    measured = Coverage()
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(report))
        found = [*shares(json.loads(report.read_text())["files"])]
    lines = ["| package | lines and branches | reached | floor |", "|---|---|---|---|"]
    lines += [f"| {one.package} | {one.there:,} | {one.percent:.0f}% | {FLOORS[one.package]}% |" for one in found]
    sys.stdout.write("\n".join(lines) + "\n")
    fallen = [one.package for one in found if one.fell]
    if fallen:
        sys.stdout.write(f"error: below the floor: {', '.join(fallen)}\n")
    return bool(fallen)


if __name__ == "__main__":
    sys.exit(main())
