"""A short run of the fault fuzzer: `python -m tests.faults.fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import fuzz

SEED = 7
CASES = 8


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["staged"])
def test_whatever_is_broken_no_token_is_wrong_and_nothing_hangs_or_stays(tmp_path: Path, mode: fuzz.Mode) -> None:
    report = fuzz.run(seed=SEED, numbers=list(range(CASES)), mode=mode, folder=tmp_path)
    assert report.failures == []
    assert report.cases == CASES
    assert report.ends["answered"] > CASES
    assert report.accounts["with blocks from prefill"] > 0
