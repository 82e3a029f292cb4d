"""Prompts of English: as long as asked, each about something else, the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.text_prompts import MODULES, documentation, text_prompts
from slipstream.errors import StartupError
from tests.support.text_model_folder import write_model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path)


def test_prompts_have_their_lengths_and_share_no_beginning(folder: Path) -> None:
    lengths = [129 + index for index in range(len(MODULES))]

    prompts = text_prompts(folder, lengths)

    assert [len(prompt) for prompt in prompts] == lengths
    assert len({tuple(prompt[:32]) for prompt in prompts}) == len(MODULES)
    assert text_prompts(folder, lengths) == prompts


def test_a_module_documents_itself_its_classes_and_their_methods() -> None:
    text = documentation("fractions")

    assert text.startswith("Fraction, infinite-precision")
    assert "Closest Fraction to self with denominator at most max_denominator." in text


def test_more_text_than_there_is_is_refused(folder: Path) -> None:
    with pytest.raises(StartupError, match="documentation of Python's decimal has"):
        text_prompts(folder, [10_000_000])
    with pytest.raises(StartupError, match="there are modules for 20"):
        text_prompts(folder, [1] * 21)
