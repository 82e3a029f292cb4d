"""Flags made from the settings model: names, types, help and defaults have one home, `slipstream.settings`.

    @app.command()
    @with_settings("model", "frontend.*", own={"frontend"})
    def frontend(loaded: LoadedConfig) -> None: ...

gives the command `--model`, `--http-port` and so on, and `--config`; it is called with the loaded configuration.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Optional, Union, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from slipstream import config
from slipstream.config_layer import setting_fields
from slipstream.errors import ConfigError
from slipstream.security import identity
from slipstream.security.names import ComponentRole

_SPELLED_OTHERWISE = {
    "control_plane.address": "--control-plane",
    "security.tls_folder": "--tls",
    "security.cluster_token_file": "--cluster-token-file",
    "security.allow_insecure": "--allow-insecure",
}
_METAVARS = {"control_plane.address": "HOST:PORT", "security.tls_folder": "FOLDER"}

CONTROL_PLANE = ("control_plane.address", "security.tls_folder", "security.cluster_token_file")
"""What commands need that talk to a running cluster."""

ConfigFlag = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of settings; SLIPSTREAM_CONFIG, else ./slipstream.yaml when absent.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Flag:
    """A setting as a flag of one command."""

    path: str
    spelling: str
    info: FieldInfo

    @property
    def parameter(self) -> str:
        return self.path.replace(".", "__")

    def annotation(self) -> Any:
        description = (self.info.description or "").replace("[", r"\[")
        option = typer.Option(
            self.spelling,
            help=f"{description}{_default_note(self.info)}",
            show_default=False,
            metavar=_METAVARS.get(self.path),
            rich_help_panel=_panel(self.path),
        )
        return Annotated[Optional[_plain_type(self.info.annotation)], option]  # noqa: UP045


def select(*patterns: str, own: Collection[str] = (), without: Collection[str] = ()) -> tuple[Flag, ...]:
    """The flags of a command.

    Args:
        patterns: dotted paths; `frontend.*` is a whole section.
        own: sections whose flags need no prefix (`--http-port`, not `--frontend-http-port`), unless two have the name.
        without: paths to leave out.
    """
    paths = [path for pattern in patterns for path in _expand(pattern) if path not in without]
    leaves = Counter(path.rpartition(".")[2] for path in paths if path.partition(".")[0] in own)
    return tuple(Flag(path, _spelling(path, own, leaves), setting_fields()[path]) for path in paths)


def with_settings(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these flags and `--config`; its first parameter receives the loaded configuration."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # Annotations are evaluated here, where the command's module is at hand: typer sees only the result.
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        def run(**given: Any) -> None:
            values = {flag.path: given.pop(flag.parameter) for flag in flags}
            loaded = _load({path: value for path, value in values.items() if value is not None}, given, flags)
            # What a person does; processes that serve say what they are where they begin.
            identity.install(loaded.settings.security, ComponentRole.OPERATOR)
            command(loaded, **given)

        parameters = [
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            _keyword("config", ConfigFlag),
            *(_keyword(flag.parameter, flag.annotation()) for flag in flags),
        ]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _load(values: Mapping[str, object], given: dict[str, Any], flags: Sequence[Flag]) -> config.LoadedConfig:
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder does not exist any more; change to another one") from None
    file = config.find_file(given.pop("config"), os.environ, folder)
    return config.load(values, os.environ, file, flag_names={flag.path: flag.spelling for flag in flags})


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _expand(pattern: str) -> list[str]:
    section, _, leaf = pattern.rpartition(".")
    if leaf != "*":
        return [pattern]
    return [path for path in setting_fields() if path.startswith(f"{section}.")]


def _spelling(path: str, own: Collection[str], leaves: Mapping[str, int]) -> str:
    section, _, leaf = path.rpartition(".")
    if path in _SPELLED_OTHERWISE and section not in own:
        return _SPELLED_OTHERWISE[path]
    unprefixed = section == "" or (section in own and leaves[leaf] == 1)
    return "--" + (leaf if unprefixed else f"{section}-{leaf}").replace("_", "-")


def _panel(path: str) -> str:
    section = path.partition(".")[0] if "." in path else "model"
    return section.replace("_", " ").capitalize()


def _default_note(info: FieldInfo) -> str:
    return "" if info.default in (None, PydanticUndefined) else rf" [dim]\[{info.default}][/dim]"


def _plain_type(annotation: Any) -> Any:
    """`int | None` -> `int`: every flag may be absent."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    (plain,) = (member for member in get_args(annotation) if member is not NoneType)
    return str if plain is SecretStr else plain
