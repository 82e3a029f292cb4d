"""Fills `slipstream.settings.Settings` and remembers where each value came from.

In order of strength: command-line flags, environment, one YAML file, defaults. `pydantic_settings` merges
and validates the layers; each layer here knows, for every setting that it gives, the place a person would
look at (a flag, a variable, a line of a file), so that every error can name it.

    SLIPSTREAM_MODEL=...                     a setting of the top level
    SLIPSTREAM_FRONTEND__HTTP_PORT=9000      a setting of a section
    SLIPSTREAM_CONFIG=cluster.yaml           the YAML file, when `--config` is not given

An environment variable that is empty counts as absent; `null` is the value "none" for settings that have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from slipstream.addresses import host_port, reachable
from slipstream.config_layer import (
    ENV_PREFIX,
    Layer,
    Origin,
    did_you_mean,
    flag_name,
    setting_fields,
    unknown_setting,
    variable_name,
)
from slipstream.errors import ConfigError
from slipstream.settings import Settings

CONFIG_VARIABLE = "SLIPSTREAM_CONFIG"
DEFAULT_FILE = "slipstream.yaml"

# Kubernetes puts these into every pod for a service that is called slipstream-something; they are no settings.
# (`NAME_PORT=tcp://...` is told from a misspelled setting by its value.)
_SERVICE_LINK = re.compile(
    r"SLIPSTREAM(_[A-Z0-9]+)*_"
    r"(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The settings, and for each of them (by dotted path, `frontend.http_port`) where its value came from."""

    settings: Settings
    origins: Mapping[str, Origin]
    file: Path | None = None


def find_file(given: Path | None, environ: Mapping[str, str], folder: Path) -> Path | None:
    """The YAML file to read: `--config`, else SLIPSTREAM_CONFIG, else `slipstream.yaml` in `folder` if there is one.

    Raises:
        ConfigError: a file that was asked for is not there.
    """
    chosen, source = given, "--config"
    if chosen is None and environ.get(CONFIG_VARIABLE):
        chosen, source = Path(environ[CONFIG_VARIABLE]), CONFIG_VARIABLE
    if chosen is None:
        implied = folder / DEFAULT_FILE
        return implied if implied.is_file() else None
    if not chosen.is_file():
        raise ConfigError(f"configuration file {chosen} (from {source}) is not a file", param="config")
    return chosen


def load(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    config_file: Path | None,
    *,
    flag_names: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read every layer and check the whole.

    Args:
        flags: dotted path -> value, for the flags that were given.
        config_file: as found by `find_file`.
        flag_names: dotted path -> the flag's spelling in this command, for messages and origins.

    Raises:
        ConfigError: a line for each thing that is wrong; it names the setting, where the value came from,
            the value and the limit.
    """
    from slipstream.config_file import read_layer  # late: YAML costs start-up time, and many runs have no file

    layers = [
        _flag_layer(flags, flag_names or {}),
        _environment_layer(environ),
        read_layer(config_file) if config_file is not None else Layer(),
    ]
    origins = {path: Origin("default") for path in setting_fields()}
    for layer in reversed(layers):
        origins.update(layer.origins)
    _derive_address(layers, origins)
    return LoadedConfig(settings=_validate(layers, origins), origins=origins, file=config_file)


def dump(settings: Settings) -> dict[str, Any]:
    """The settings as plain nested data, as YAML and JSON take it; `load` of it gives equal settings."""
    return settings.model_dump(mode="json")


def _flag_layer(flags: Mapping[str, object], names: Mapping[str, str]) -> Layer:
    layer, known = Layer(), setting_fields()
    for path, value in flags.items():
        spelling = names.get(path, flag_name(path))
        if path not in known:
            raise ConfigError(unknown_setting(path, spelling), param=path)
        layer.give(path, value, Origin("flag", spelling))
    return layer


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    layer = Layer()
    known = {variable_name(path): (path, info) for path, info in setting_fields().items()}
    wrong: list[str] = []
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name == CONFIG_VARIABLE:
            continue
        if name in known:
            path, info = known[name]
            nothing = value.lower() == "null" and NoneType in get_args(info.annotation)
            if value != "":
                layer.give(path, None if nothing else value, Origin("environment", name))
        elif not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            wrong.append(f"environment variable {name} is not a setting{did_you_mean(name.upper(), known)}")
    if wrong:
        raise ConfigError("\n".join(sorted(wrong)))
    return layer


class _LayerSource(PydanticBaseSettingsSource):
    """One layer in the shape in which pydantic-settings merges."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._nested: dict[str, Any] = {}
        for path, value in layer.values.items():
            section, _, leaf = path.rpartition(".")
            (self._nested.setdefault(section, {}) if section else self._nested)[leaf] = value

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._nested.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._nested


class _Layered(Settings, BaseSettings):
    """Settings whose only sources are the layers handed in: the process environment is not read behind our back."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        layers = cast(Any, init_settings).init_kwargs["layers"]
        return tuple(_LayerSource(settings_cls, layer) for layer in layers)


def _validate(layers: list[Layer], origins: Mapping[str, Origin]) -> Settings:
    try:
        layered = cast(Any, _Layered)(layers=layers)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(detail, origins) for detail in error.errors())) from None
    return Settings(**{name: getattr(layered, name) for name in Settings.model_fields})


def _complaint(detail: Mapping[str, Any], origins: Mapping[str, Origin]) -> str:
    path = ".".join(str(part) for part in detail["loc"][:2])
    limit = str(detail["msg"]).replace("Input should be", "must be")
    origin = origins.get(path, Origin("default"))
    about = setting_fields().get(path)
    meaning = f" ({about.description})" if about is not None and about.description else ""
    return f"{path} = {detail['input']!r} ({origin}): {limit}{meaning}"


def _derive_address(layers: list[Layer], origins: dict[str, Origin]) -> None:
    """Who moves the control plane moves its address too, unless they say where it is found."""
    port, host, address = "control_plane.port", "control_plane.host", "control_plane.address"
    moved = [path for path in (port, host) if origins[path].kind != "default"]
    if not moved or origins[address].kind != "default":
        return
    defaults = Settings().control_plane
    given: dict[str, object] = {}
    for layer in reversed(layers):
        given.update(layer.values)
    listens_on = str(given.get(host, defaults.host))
    reached_at = host_port(reachable(listens_on), str(given.get(port, defaults.port)))
    layers[-1].give(address, reached_at, Origin("derived", moved[0]))
    origins[address] = layers[-1].origins[address]
