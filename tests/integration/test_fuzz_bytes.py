"""Each byte fuzzer for a moment, with a fixed seed; `make fuzz-bytes` runs them for longer."""

from __future__ import annotations

import pytest

from tests.fuzz import campaign
from tests.fuzz.__main__ import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_what_is_promised_comes_out_of_a_reader(name: str) -> None:
    (outcome,) = campaign.run([name], runs=500, seed=7)
    assert (outcome.crashes, outcome.finding) == (0, "")
    assert outcome.inputs >= 500
    assert outcome.coverage > 0
