"""What a base image lacks of a lock, and whether what is there in the end suits us; run while an image is built.

    base_packages.py lacking LOCK WHEEL    the part of LOCK to install, with its hashes
    base_packages.py check NAME...         fail unless all that these packages ask for is there, in versions they take

A package that the base has stays as it is unless our wheel itself asks for another version: the base's torch and vLLM
were built and tested with their company. The lock was resolved together with the same vLLM, so what is replaced suits
that too, and `check` says if not.

Runs under the base's interpreter, before anything of ours is installed: with the standard library and `packaging`.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.parser import HeaderParser
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_PINNED = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)[^\n]*(?:\n[ \t]+[^\n]*)*", re.MULTILINE)


def lacking(lock: str, asked: Iterable[str], installed: Mapping[str, str]) -> str:
    """The entries of a lock that have to be installed.

    Args:
        lock: its text.
        asked: requirements of our wheel, which may have markers.
        installed: versions by canonical name.
    """
    ours: dict[str, list[Requirement]] = {}
    for requirement in _applicable(asked):
        ours.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    entries = []
    for match in _PINNED.finditer(lock):
        name = canonicalize_name(match["name"])
        there = installed.get(name)
        suits = there is not None and all(
            requirement.specifier.contains(there, prereleases=True) for requirement in ours.get(name, ())
        )
        if not suits:
            entries.append(match[0].rstrip())
    return "".join(f"{entry}\n" for entry in entries)


def faults(roots: Sequence[str], requires: Callable[[str], Iterable[str]], installed: Mapping[str, str]) -> list[str]:
    """What is missing or of a version that is not taken, among all that the roots need.

    Args:
        requires: the requirements of an installed package, by canonical name.
    """
    found, seen, waiting = [], set(), [canonicalize_name(root) for root in roots]
    found += [f"{root} is not installed" for root in waiting if root not in installed]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in installed:
            continue
        seen.add(name)
        for requirement in _applicable(requires(name)):
            needed = canonicalize_name(requirement.name)
            there = installed.get(needed)
            if there is None:
                found.append(f"{name} needs {requirement}, which is not there")
            elif not requirement.specifier.contains(there, prereleases=True):
                found.append(f"{name} needs {requirement}, there is {there}")
            waiting.append(needed)
    return sorted(set(found))


def _applicable(lines: Iterable[str]) -> list[Requirement]:
    """Those whose markers hold here, extras left out."""
    parsed = [Requirement(line) for line in lines]
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]


def _installed() -> dict[str, str]:
    return {canonicalize_name(each.metadata["Name"]): each.version for each in metadata.distributions()}


def _asked_by(wheel: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def main(arguments: list[str]) -> int:
    match arguments:
        case ["lacking", lock, wheel]:
            with open(lock, encoding="utf-8") as file:
                sys.stdout.write(lacking(file.read(), _asked_by(wheel), _installed()))
            return 0
        case ["check", *roots] if roots:
            wrong = faults(roots, lambda name: metadata.requires(name) or (), _installed())
            sys.stderr.write("".join(f"error: {each}\n" for each in wrong))
            return 1 if wrong else 0
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
