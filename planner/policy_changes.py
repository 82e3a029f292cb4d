"""What differs between two scaling policies, setting by setting, for people who are about to put one in force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.objectives import PlannerObjectives
from planner.policy_schema import from_objectives


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """One setting's two values as YAML would have them; empty where it is not there."""

    setting: str
    before: str
    after: str


def policy_changes(before: PlannerObjectives, after: PlannerObjectives) -> list[PolicyChange]:
    """In the order of the newer policy, what is gone last. The order of models and classes is no difference."""
    old, new = _settings(before), _settings(after)
    changed = [PolicyChange(name, old.get(name, ""), value) for name, value in new.items() if old.get(name) != value]
    return changed + [PolicyChange(name, value, "") for name, value in old.items() if name not in new]


def _settings(objectives: PlannerObjectives) -> dict[str, str]:
    return dict(_leaves("", from_objectives(objectives).model_dump(mode="json")))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}" if path else name, inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            named = inner.get("model") if isinstance(inner, dict) else None
            yield from _leaves(f"{path}[{number if named is None else named}]", inner)
    else:
        yield path, str(value).lower() if isinstance(value, bool) else str(value)
