"""YAML from a person's hand: read as nodes, which know their lines, and made into values only where they belong.

Hostile anchors and tags never expand, a name that is given twice is refused, and every error has its line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from slipstream.errors import ConfigError

MAX_BYTES = 1 << 20

Place = tuple[str | int, ...]
"""The way to a value: names and list indices."""


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ConfigError: unreadable, too large, not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; is this the configuration file?")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


@contextmanager
def composed(text: str, name: str) -> Iterator[tuple[yaml.SafeLoader, yaml.Node | None]]:
    """The loader and the root, none of an empty text. In the body, too, what is no YAML ends as an error with its line.

    Raises:
        ConfigError: not YAML.
    """
    try:
        loader = yaml.SafeLoader(text)
        yield loader, loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{where}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None


def entries(name: str, node: yaml.Node, about: str = "the file") -> Iterator[tuple[str, yaml.Node, str]]:
    """The names of a mapping, each once, with their values and their places.

    Raises:
        ConfigError: not a mapping of plain names, or a name comes twice.
    """
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{about} ({name}:{node.start_mark.line + 1}) must be a mapping of names to values")
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{name}:{line}: a setting's name must be plain text")
        if key.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{name}:{line}: merge keys (<<) are not supported")
        if key.value in seen:
            raise ConfigError(f"{name}:{line}: {key.value} was already set in line {seen[key.value]}")
        seen[key.value] = line
        yield key.value, value, f"{name}:{line}"


def check_no_aliases(node: yaml.Node, about: str, where: str, seen: set[int]) -> None:
    """One node in two places could be a million: a list of settings is written out.

    Raises:
        ConfigError: there is an alias.
    """
    if id(node) in seen:
        raise ConfigError(f"{about} ({where}) has an alias (*name); write the values out", param=about)
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            check_no_aliases(key, about, where, seen)
            check_no_aliases(value, about, where, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            check_no_aliases(value, about, where, seen)


def plain_values(text: str, name: str) -> tuple[object, Mapping[Place, int]]:
    """A whole text as plain values, and the line of each.

    Raises:
        ConfigError: not YAML, a repeated name, an alias.
    """
    lines: dict[Place, int] = {}
    with composed(text, name) as (loader, root):
        if root is None:
            return None, {(): 1}
        check_no_aliases(root, "the file", name, set())
        return _plain(loader, root, name, (), root.start_mark.line + 1, lines), lines


def field_name(place: Place) -> str:
    """`models[0].objectives.realtime`."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return parts.removeprefix(".")


def _plain(
    loader: yaml.SafeLoader, node: yaml.Node, name: str, place: Place, line: int, lines: dict[Place, int]
) -> object:
    """`line`: of the value's name, where a person looks; of the value itself in a list."""
    lines[place] = line
    if isinstance(node, yaml.MappingNode):
        values: dict[str, object] = {}
        for key, value, where in entries(name, node, field_name(place) or "the file"):
            key_line = int(where.rpartition(":")[2])
            values[key] = _plain(loader, value, name, (*place, key), key_line, lines)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(loader, value, name, (*place, number), value.start_mark.line + 1, lines)
            for number, value in enumerate(node.value)
        ]
    scalar: object = loader.construct_object(node)
    return scalar
