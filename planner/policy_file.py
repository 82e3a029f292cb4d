"""The scaling policy as one YAML file: read into `planner.objectives`, and written so that it reads the same.

Every error names the file, the line, the field, what it holds and the limit; all of a file's errors come at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from planner.objectives import PlannerObjectives
from planner.policy_schema import ModelPart, ObjectivePart, PolicyPart, from_objectives, to_objectives
from slipstream.errors import ConfigError
from slipstream.yaml_nodes import Place, field_name, plain_values, read_text

EXAMPLE = Path(__file__).with_name("policy_example.yaml")
"""A commented policy with every setting."""

_MAX_SHOWN_CHARS = 60


def read_policy(path: Path) -> PlannerObjectives:
    """A policy file.

    Raises:
        ConfigError: unreadable, not YAML, or a setting is wrong; a line for each thing that is.
    """
    return parse_policy(read_text(path), str(path))


def parse_policy(text: str, name: str) -> PlannerObjectives:
    """A policy file's text; `name` stands for the file in errors.

    Raises:
        ConfigError: as for `read_policy`.
    """
    values, lines = plain_values(text, name)
    if not isinstance(values, dict):
        raise ConfigError(f"{name}:{lines[()]}: the policy must be a mapping of names to values", param="policy")
    try:
        return to_objectives(PolicyPart.model_validate(values))
    except ValidationError as error:
        told = [_complaint(detail, name, lines) for detail in error.errors(include_url=False)]
        first = told[0][1]
        raise ConfigError("\n".join(message for _, _, message in sorted(told)), param=first) from None


def dump_policy(objectives: PlannerObjectives) -> str:
    """As YAML, without what is the default; `parse_policy` gives the same objectives again."""
    part = from_objectives(objectives)
    # Escaped to ASCII: PyYAML writes some line separators unescaped otherwise, and reads them back as spaces.
    return yaml.safe_dump(_in_order(part.model_dump(mode="json", exclude_defaults=True), part), sort_keys=False)


def write_policy(objectives: PlannerObjectives, path: Path) -> None:
    """Write it for `read_policy`."""
    path.write_text(dump_policy(objectives), encoding="utf-8")


def _in_order(plain: dict[str, Any], part: PolicyPart) -> dict[str, Any]:
    """A class of requests with nothing but defaults must still be named."""
    for model, written in zip(part.models, plain["models"], strict=True):
        written["objectives"] = {name: written["objectives"][name] for name in model.objectives}
    return plain


def _complaint(detail: Mapping[str, Any], name: str, lines: Mapping[Place, int]) -> tuple[int, str, str]:
    """The line, the field, and the message."""
    place: Place = tuple(part for part in detail["loc"] if part != "[key]")
    field, kind = field_name(place), detail["type"]
    if detail["loc"][-1:] == ("[key]",) or kind == "extra_forbidden":
        limit = f"is no setting here{_near(place)}"
    elif kind == "missing":
        limit = "is missing"
    elif kind == "value_error":
        limit = _with_value(str(detail["ctx"]["error"]), detail["input"])
    else:
        limit = _with_value(_in_our_words(str(detail["msg"])), detail["input"])
    line = _line(place, lines)
    return line, field, f"{name}:{line}: {field}: {limit}" if field else f"{name}:{line}: {limit}"


def _in_our_words(message: str) -> str:
    for theirs, ours in (
        ("Input should be", "must be"),
        ("Dictionary should have", "must have"),
        ("List should have", "must have"),
        ("String should have", "must have"),
        ("Value should have", "must have"),
        (" a valid dictionary or instance of ", " a mapping: "),
        ("a valid dictionary", "a mapping"),
    ):
        message = message.replace(theirs, ours)
    return message.partition(" after validation")[0].partition(": ")[0]


def _with_value(limit: str, value: object) -> str:
    if isinstance(value, dict | list | BaseModel):
        return limit
    shown = "empty" if value is None or value == "" else repr(value) if isinstance(value, str) else str(value)
    if isinstance(value, bool):
        shown = shown.lower()
    if len(shown) > _MAX_SHOWN_CHARS:
        shown = f"{shown[:_MAX_SHOWN_CHARS]}..."
    return f"{limit}, is {shown}"


def _line(place: Place, lines: Mapping[Place, int]) -> int:
    """The nearest line that there is: what is missing has none of its own."""
    while place not in lines and place:
        place = place[:-1]
    return lines[place]


def _near(place: Place) -> str:
    known = _names(place[:-1])
    near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _names(place: Place) -> list[str]:
    """What may stand in the mapping at a place."""
    kind: Any = PolicyPart
    for part in place:
        if isinstance(part, int):
            continue
        if kind is dict:
            kind = ObjectivePart
            continue
        annotation = kind.model_fields[part].annotation
        if kind is ModelPart and part == "objectives":
            kind = dict
        else:
            kind = next((each for each in getattr(annotation, "__args__", ()) if isinstance(each, type)), annotation)
    return ["realtime", "nearline", "batch"] if kind is dict else list(kind.model_fields)
