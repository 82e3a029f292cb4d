"""The short selection of the fault table, with real workers, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.case import Measured, Promise, broken


@pytest.mark.timeout(600)
def test_the_short_selection_keeps_what_the_table_promises(tmp_path: Path) -> None:
    measured = table.run(folder=tmp_path, short=True)
    assert {one.name: one.broken for one in measured.results if one.broken} == {}
    counts = measured.counts()
    assert counts["kept_their_promise"] == counts["cases"] > 0
    assert counts["wrong"] == counts["untyped"] == counts["hung"] == counts["left_held"] == 0


def test_the_page_is_what_the_cases_and_the_figures_say() -> None:
    assert table.PAGE.read_text() == table.page(), "write it anew: python -m tests.faults.table --docs"


def test_cases_have_names_of_their_own_and_are_grouped_by_fault() -> None:
    names = [case.name for case in table.CASES]
    assert len(set(names)) == len(names)
    faults = [case.fault for case in table.CASES]
    assert faults == sorted(faults, key=faults.index)
    assert all((case.inflict is None) != (case.alone is None) for case in table.CASES)


def test_whatever_is_promised_a_wrong_token_breaks_it() -> None:
    promise = Promise("all is lost", silence_s=1.0, lost=10)
    whole = Measured(requests=10, answered=10)
    assert broken(promise, whole) == []
    for worse in (Measured(requests=9, wrong=1), Measured(requests=9, untyped=1), Measured(requests=9, hung=1)):
        assert broken(promise, worse) != []
    assert broken(promise, Measured(requests=20, lost=11, codes={"worker_lost": 11})) != []
    assert broken(promise, Measured(requests=1, silence_s=1.1)) != []
    assert broken(promise, Measured(requests=1, kept=["blocks"])) == ["blocks"]
    assert broken(promise, Measured()) == ["nothing was asked"]
