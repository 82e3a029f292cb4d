"""Writes docs/configuration.md from `slipstream.settings` (the command behind `make docs`).

The settings' own descriptions are the documentation; a test fails when the page is not what this would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from slipstream.settings import Settings

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_HEAD: Final = """\
# Configuration

One set of settings for every component. A value comes from, in order of strength: a command-line flag, an environment
variable, the YAML file, the default. `slipstream config show` prints each value and where it came from;
`slipstream COMMAND --help` lists the flags of a command.

The YAML file is named by `--config` or `SLIPSTREAM_CONFIG`, else it is `slipstream.yaml` in the current folder if
there is one:

```yaml
model: smollm2-135m-instruct
frontend:
  http_port: 9000
```

The environment variable of `frontend.http_port` is `SLIPSTREAM_FRONTEND__HTTP_PORT`. Names carry their units: `_s` is
seconds, `_bytes` bytes, `_tokens` tokens.

<!-- Written by `make docs` from slipstream/settings.py; not edited by hand. -->
"""
_LIMITS: Final = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def render() -> str:
    """The whole page."""
    top: dict[str, FieldInfo] = {}
    sections: dict[str, type[BaseModel]] = {}
    for name, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            sections[name] = info.annotation
        else:
            top[name] = info
    parts = [_HEAD, "## Top level\n", _table(top)]
    for name, section in sections.items():
        parts += [f"## `{name}`\n", f"{section.__doc__}\n", _table(section.model_fields)]
    return "\n".join(parts)


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = [
        f"| `{name}` | {_default(info)} | {_limits(info)} | {_escape(info.description or '')} |"
        for name, info in fields.items()
    ]
    return "\n".join(["| setting | default | limits | what it is |", "|---|---|---|---|", *rows, ""])


def _default(info: FieldInfo) -> str:
    return "none" if info.default is None or info.default == () else f"`{info.default}`"


def _limits(info: FieldInfo) -> str:
    schema: dict[str, Any] = {}
    for rule in info.metadata:
        schema |= {name: getattr(rule, name) for name in _LIMITS if hasattr(rule, name)}
    choices = [f"`{choice}`" for choice in getattr(info.annotation, "__args__", ()) if isinstance(choice, str)]
    return ", ".join(choices or [text.format(schema[name]) for name, text in _LIMITS.items() if name in schema])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
