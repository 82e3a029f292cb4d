"""The YAML file of settings: read with the line of each value, and written for child processes.

The file is composed into YAML nodes, not loaded into objects, because only nodes know their lines; a value is
built only once it is known to belong to a setting, so that hostile anchors and tags never expand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import yaml

from slipstream.config_layer import Layer, Origin, did_you_mean, setting_fields, unknown_setting
from slipstream.errors import ConfigError
from slipstream.settings import Settings

_MAX_BYTES = 1 << 20


def read_layer(path: Path) -> Layer:
    """What the file gives. A section without content gives nothing.

    Raises:
        ConfigError: unreadable, not YAML, not a mapping, an unknown or repeated name; with the line.
    """
    text = _read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return _layer(path, loader, root) if root is not None else Layer()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None


def write(settings: Settings, path: Path) -> None:
    """Write all settings, so that `load({}, {}, path)` gives them again."""
    # Escaped to ASCII: PyYAML writes some line separators unescaped otherwise, and reads them back as spaces.
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    path.write_text(f"# Every setting with its resolved value; see `slipstream config show`.\n{text}", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes; is this the configuration file?")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _layer(path: Path, loader: yaml.SafeLoader, root: yaml.Node) -> Layer:
    layer, known = Layer(), setting_fields()
    sections = {name.partition(".")[0] for name in known if "." in name}
    for name, value, where in _entries(path, root):
        if name in known:
            layer.give(name, _value(loader, name, value, where), Origin("file", where))
        elif name not in sections:
            hint = did_you_mean(name, [*sections, *known])
            message = f"{name} ({where}) is not a setting{hint}" if hint else unknown_setting(name, where)
            raise ConfigError(message, param=name)
        elif not _is_empty(value):
            for leaf, leaf_value, leaf_where in _entries(path, value, section=name):
                full = f"{name}.{leaf}"
                if full not in known:
                    raise ConfigError(unknown_setting(full, leaf_where), param=full)
                layer.give(full, _value(loader, full, leaf_value, leaf_where), Origin("file", leaf_where))
    return layer


def _entries(path: Path, node: yaml.Node, section: str = "") -> Iterator[tuple[str, yaml.Node, str]]:
    """The names of a mapping, each once, with their values and their places."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{section or 'the file'} ({where}) must be a mapping of names to values")
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a setting's name must be plain text")
        if key.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{path}:{line}: merge keys (<<) are not supported")
        if key.value in seen:
            raise ConfigError(f"{path}:{line}: {key.value} was already set in line {seen[key.value]}")
        seen[key.value] = line
        yield key.value, value, f"{path}:{line}"


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _value(loader: yaml.SafeLoader, name: str, node: yaml.Node, where: str) -> object:
    if get_origin(setting_fields()[name].annotation) is not tuple or isinstance(node, yaml.ScalarNode):
        return _scalar(loader, name, node, where)
    _check_no_aliases(node, name, where, set())
    values: object = loader.construct_object(node, deep=True)
    return values


def _check_no_aliases(node: yaml.Node, name: str, where: str, seen: set[int]) -> None:
    """One node in two places could be a million: a list of settings is written out."""
    if id(node) in seen:
        raise ConfigError(f"{name} ({where}) has an alias (*name); write the values out", param=name)
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _check_no_aliases(key, name, where, seen)
            _check_no_aliases(value, name, where, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_no_aliases(value, name, where, seen)


def _scalar(loader: yaml.SafeLoader, name: str, node: yaml.Node, where: str) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{name} ({where}) must be a single value, not a list or mapping", param=name)
    value: object = loader.construct_object(node)
    return value
