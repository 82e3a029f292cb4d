"""`slipstream config show` and `slipstream version`, and how examples are laid out in help texts."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated

import typer

from slipstream import __version__, config
from slipstream.cli.flags import select, with_settings
from slipstream.config import LoadedConfig
from slipstream.errors import ConfigError

PANEL = "Configuration"

_ALL_FLAGS = select(
    "model",
    "served_model_name",
    "device",
    "dtype",
    "cluster.*",
    "frontend.*",
    "security.*",
    "worker.*",
    "model_cache.*",
    "control_plane.*",
    "transfer.*",
    "log.*",
    "tracing.*",
)


def examples(*lines: tuple[str, str]) -> str:
    """An epilog of commands and what each does."""
    shown = [f"  [bold]{command}[/bold]\n      [dim]{meaning}[/dim]" for command, meaning in lines]
    return "\n".join(["Examples:", *shown])


def add_to(app: typer.Typer, configuration: typer.Typer) -> None:
    configuration.command(
        "show",
        epilog=examples(
            ("slipstream config show", "every setting, its value and where that came from"),
            ("slipstream config show --yaml > slipstream.yaml", "a configuration file to start from"),
            ("SLIPSTREAM_FRONTEND__HTTP_PORT=9000 slipstream config show", "what a variable changes"),
        ),
    )(show)
    app.command(rich_help_panel=PANEL)(version)


@with_settings(*_ALL_FLAGS)
def show(
    loaded: LoadedConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print values and origins as JSON.")] = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the values as a configuration file.")] = False,
) -> None:
    """Show every setting, its value, and where that came from: a flag, the environment, the file, or the default."""
    if as_json and as_yaml:
        raise ConfigError("--json and --yaml exclude each other")
    if as_json:
        print(json.dumps(_values_and_origins(loaded), indent=2))  # noqa: T201
    elif as_yaml:
        import yaml

        print(yaml.safe_dump(config.dump(loaded.settings), sort_keys=False), end="")  # noqa: T201
    else:
        _print_table(loaded)


def version() -> None:
    """Print the versions of Slipstream and of what it stands on."""
    print(f"slipstream {__version__}")  # noqa: T201
    print(f"python     {platform.python_version()}")  # noqa: T201
    for name in ("grpcio", "protobuf", "vllm", "torch"):
        print(f"{name:10} {_installed_version(name)}")  # noqa: T201


def _values_and_origins(loaded: LoadedConfig) -> dict[str, dict[str, object]]:
    plain = config.dump(loaded.settings)
    return {
        path: {"value": _value(plain, path), "origin": origin.kind, "place": origin.place}
        for path, origin in loaded.origins.items()
    }


def _value(plain: dict[str, object], path: str) -> object:
    section, _, leaf = path.rpartition(".")
    inner = plain[section] if section else plain
    assert isinstance(inner, dict)
    value: object = inner[leaf]
    return value


def _print_table(loaded: LoadedConfig) -> None:
    from rich.table import Table
    from rich.text import Text

    from slipstream.cli.terminal import output

    table = Table("setting", "value", "origin", box=None, pad_edge=False, header_style="bold")
    for path, entry in _values_and_origins(loaded).items():
        origin = loaded.origins[path]
        value = "-" if entry["value"] is None else str(entry["value"])
        style = "dim" if origin.kind == "default" else ""
        table.add_row(Text(path), Text(value, style=style), Text(str(origin), style=style))
    output().print(table)


def _installed_version(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
