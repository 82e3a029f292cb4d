"""The policy file's reference in the docs is the schema's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from planner.policy_schema import BoundsPart, ModelPart, ObjectivePart, PolicyPart, WindowPart

PAGE = Path(__file__).resolve().parents[3] / "docs" / "planner.md"


def rows(part: type[BaseModel]) -> Iterator[str]:
    """A row of a table for each setting."""
    for name, info in part.model_fields.items():
        plain = info.default is not PydanticUndefined and info.default != ""
        default = f"`{str(info.default).lower()}`" if plain else "" if info.is_required() else "-"
        yield f"| `{name}` | {default or 'required'} | {info.description} |"


@pytest.mark.parametrize("part", [PolicyPart, ModelPart, ObjectivePart, BoundsPart, WindowPart])
def test_the_page_has_every_setting_with_its_default_and_meaning(part: type[BaseModel]) -> None:
    page = PAGE.read_text()
    assert [row for row in rows(part) if row not in page] == []
