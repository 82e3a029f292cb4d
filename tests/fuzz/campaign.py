"""Runs targets one after another, each in a process of its own, and counts what libFuzzer says."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INPUT_S = 10
_MEMORY_MB = 2048
_START_S = 300.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one target.

    Attributes:
        coverage: branches of the reader that were taken. crashes: inputs that broke a promise; `finding` is one.
    """

    name: str
    inputs: int
    coverage: int
    crashes: int
    finding: str = ""


def run(names: Sequence[str], *, runs: int = 0, seconds: float = 0.0, seed: int = 1) -> list[Outcome]:
    """Fuzz these targets, each for so many inputs or so long, whichever ends first; 0: no such limit."""
    return [_one(name, runs, seconds, seed) for name in names]


def _one(name: str, runs: int, seconds: float, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="slipstream-fuzz-") as folder:
        corpus, found = Path(folder) / "corpus", Path(folder) / "found"
        corpus.mkdir()
        found.mkdir()
        argv = [sys.executable, "-m", "tests.fuzz.one", name, str(corpus), f"-seed={seed}", "-max_len=4096"]
        argv += [f"-runs={runs or -1}", f"-max_total_time={max(1, int(seconds)) if seconds else 0}"]
        argv += [f"-timeout={_INPUT_S}", f"-rss_limit_mb={_MEMORY_MB}", "-print_final_stats=1"]
        argv += [f"-artifact_prefix={found}/", "-verbosity=1"]
        limit_s = _START_S + (seconds or runs / 100)
        done = subprocess.run(argv, capture_output=True, timeout=limit_s, check=False)
        inputs = re.search(rb"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        covered = re.findall(rb"cov: (\d+)", done.stderr)
        broken = sorted(found.iterdir())
        if inputs is None or (done.returncode != 0 and not broken):
            raise RuntimeError(f"{name}: {done.stdout[-1000:].decode()} {done.stderr[-2000:].decode(errors='replace')}")
        finding = ""
        if broken:
            words = done.stdout.decode(errors="replace").partition("Uncaught")[2][:2000]
            finding = f"{broken[0].name}: {broken[0].read_bytes()[:200]!r} {words}"
        return Outcome(name, int(inputs[1]), int(covered[-1]) if covered else 0, len(broken), finding)
