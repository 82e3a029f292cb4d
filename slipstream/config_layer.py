"""One layer of configuration: values by setting, the place of each, and the names that settings have.

`slipstream.config` merges the layers; `slipstream.config_file` and the environment and flags fill them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from slipstream.settings import Settings

ENV_PREFIX = "SLIPSTREAM_"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
        place: the flag, the variable, or `file.yaml:12`; for `derived`, the setting it was derived from.
    """

    kind: Literal["default", "file", "environment", "flag", "derived"]
    place: str = ""

    def __str__(self) -> str:
        return f"from {self.place}" if self.kind == "derived" else self.place or self.kind


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source gives: values by dotted path, and the place of each."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def give(self, path: str, value: object, origin: Origin) -> None:
        self.values[path] = value
        self.origins[path] = origin


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def unknown_setting(path: str, where: str) -> str:
    """The message for a name that is no setting. It also finds `http_port` meant as `frontend.http_port`."""
    known = setting_fields()
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == path.rpartition(".")[2]]
    hint = f"; did you mean {same_leaf[0]}?" if same_leaf else did_you_mean(path, known)
    return f"{path} ({where}) is not a setting{hint}"


def setting_fields() -> dict[str, FieldInfo]:
    """Every setting by its dotted path, in the order of `slipstream.settings`."""
    fields: dict[str, FieldInfo] = {}
    for name, info in Settings.model_fields.items():
        section = _section_model(info)
        if section is None:
            fields[name] = info
        else:
            fields.update({f"{name}.{leaf}": leaf_info for leaf, leaf_info in section.model_fields.items()})
    return fields


def variable_name(path: str) -> str:
    """The environment variable of a setting: `frontend.http_port` -> `SLIPSTREAM_FRONTEND__HTTP_PORT`."""
    return ENV_PREFIX + path.replace(".", "__").upper()


def flag_name(path: str) -> str:
    """How a setting is spelled as a flag where no command has a shorter name for it."""
    return "--" + path.replace(".", "-").replace("_", "-")


def _section_model(info: FieldInfo) -> type[BaseModel] | None:
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
