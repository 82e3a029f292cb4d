"""Writes what is told of the settings elsewhere from `slipstream.settings` (the command behind `make docs`):
docs/configuration.md, and the part of the Helm chart's values that settings may be given in.

The settings' own descriptions are the documentation; a test fails when either is not what this would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from slipstream.settings import Settings

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

CHART_SCHEMA: Final = PAGE.parent.parent / "deploy" / "helm" / "slipstream" / "values.schema.json"

# Named after what the chart decides itself: who listens where, under which name, and how long a pod may take.
CHART_DECIDES: Final = frozenset(
    {
        "model",
        "served_model_name",
        "api_key",
        *(f"control_plane.{name}" for name in ("host", "port", "address", "metrics_port")),
        *(f"frontend.{name}" for name in ("host", "http_port", "grpc_port", "workers", "drain_timeout_s")),
        *(f"worker.{name}" for name in ("worker_id", "node", "host", "port", "metrics_port")),
        *(f"worker.{name}" for name in ("start_timeout_s", "drain_timeout_s")),
        *(f"worker.{name}" for name in ("nnodes", "node_rank", "master_addr", "master_port")),
        *(f"transfer.{name}" for name in ("host", "port")),
        *(f"security.{name}" for name in ("keys_file", "anonymous")),
        *(
            f"security.{name}"
            for name in ("tls_folder", "ca_file", "certificate_file", "key_file", "cluster_token_file")
        ),
        *(f"security.face_{name}_file" for name in ("certificate", "key", "client_ca")),
        "cluster",
        "planner",
        *(f"kubernetes.{name}" for name in ("namespace", "selector", "lease", "leader_worker_sets")),
        *(f"kubernetes.{name}" for name in ("kubeconfig", "context")),
    }
)
_OF_A_POOL: Final = ("worker", "simulated", "transfer")

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


def render_chart_schema(current: str) -> str:
    """The schema of the chart's values, with its definitions of settings made anew.

    Args:
        current: the file as it is; all the rest of it is written by hand.
    """
    schema = json.loads(current)
    settings = _chart_settings()
    pool = {name: each for name, each in settings["properties"].items() if name in _OF_A_POOL}
    schema["definitions"]["settings"] = settings
    schema["definitions"]["poolConfig"] = settings | {
        "properties": pool,
        "description": "settings of this pool alone, over `config`",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _chart_settings() -> dict[str, Any]:
    """JSON Schema of the settings that the chart leaves to its user."""
    whole = Settings.model_json_schema()
    plain: dict[str, Any] = _plain(whole, whole.get("$defs", {}))
    plain["description"] = "settings of the product; see docs/configuration.md"
    for path in sorted(CHART_DECIDES):
        section, _, name = path.rpartition(".")
        properties = plain["properties"][section]["properties"] if section else plain["properties"]
        del properties[name]
    return plain


def _plain(node: Any, definitions: dict[str, Any]) -> Any:
    """Without titles and defaults, which say nothing new, and with definitions in the places where they are used."""
    if isinstance(node, list):
        return [_plain(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(definitions[node["$ref"].rpartition("/")[2]], definitions)
    dropped = {"title", "default", "$defs", "format"}
    plain = {name: _plain(each, definitions) for name, each in node.items() if name not in dropped | {"properties"}}
    if "properties" in node:
        plain["properties"] = {name: _plain(each, definitions) for name, each in node["properties"].items()}
    return plain


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    CHART_SCHEMA.write_text(render_chart_schema(CHART_SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
