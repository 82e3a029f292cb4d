"""The YAML file of settings: read with the line of each value, and written for child processes.

The file is composed into YAML nodes, not loaded into objects, because only nodes know their lines; a value is
built only once it is known to belong to a setting, so that hostile anchors and tags never expand.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_origin

import yaml

from slipstream.config_layer import Layer, Origin, did_you_mean, setting_fields, unknown_setting
from slipstream.errors import ConfigError
from slipstream.settings import Settings
from slipstream.yaml_nodes import check_no_aliases, composed, entries, read_text


def read_layer(path: Path) -> Layer:
    """What the file gives. A section without content gives nothing.

    Raises:
        ConfigError: unreadable, not YAML, not a mapping, an unknown or repeated name; with the line.
    """
    with composed(read_text(path), str(path)) as (loader, root):
        return _layer(path, loader, root) if root is not None else Layer()


def write(settings: Settings, path: Path) -> None:
    """Write all settings, so that `load({}, {}, path)` gives them again."""
    # Escaped to ASCII: PyYAML writes some line separators unescaped otherwise, and reads them back as spaces.
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    path.write_text(f"# Every setting with its resolved value; see `slipstream config show`.\n{text}", encoding="utf-8")


def _layer(path: Path, loader: yaml.SafeLoader, root: yaml.Node) -> Layer:
    layer, known = Layer(), setting_fields()
    sections = {name.partition(".")[0] for name in known if "." in name}
    for name, value, where in entries(str(path), root):
        if name in known:
            layer.give(name, _value(loader, name, value, where), Origin("file", where))
        elif name not in sections:
            hint = did_you_mean(name, [*sections, *known])
            message = f"{name} ({where}) is not a setting{hint}" if hint else unknown_setting(name, where)
            raise ConfigError(message, param=name)
        elif not _is_empty(value):
            for leaf, leaf_value, leaf_where in entries(str(path), value, name):
                full = f"{name}.{leaf}"
                if full not in known:
                    raise ConfigError(unknown_setting(full, leaf_where), param=full)
                layer.give(full, _value(loader, full, leaf_value, leaf_where), Origin("file", leaf_where))
    return layer


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _value(loader: yaml.SafeLoader, name: str, node: yaml.Node, where: str) -> object:
    if get_origin(setting_fields()[name].annotation) is not tuple or isinstance(node, yaml.ScalarNode):
        return _scalar(loader, name, node, where)
    check_no_aliases(node, name, where, set())
    values: object = loader.construct_object(node, deep=True)
    return values


def _scalar(loader: yaml.SafeLoader, name: str, node: yaml.Node, where: str) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{name} ({where}) must be a single value, not a list or mapping", param=name)
    value: object = loader.construct_object(node)
    return value
