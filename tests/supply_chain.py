"""`make audit`: what is known against the packages that the locks name, and under which licences they come.

python -m tests.supply_chain [--advisories FILE] [LOCK ...]

With `--advisories` nothing goes over the network: FILE is OSV's export for PyPI (`all.zip` of the PyPI ecosystem, see
https://google.github.io/osv.dev/data/), fetched where there is one. Without, pip-audit asks OSV. Licences are read from
what is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LOCKS = Path(__file__).parent.parent / "requirements"
SHIPPED = ("image-light", "image-worker", "image-cuda")
_ASK_TIMEOUT_S = 600

# What may not be in an image that somebody hands on. A weak one (LGPL, MPL) is no matter for a program that imports it.
_STRONG_COPYLEFT = re.compile(r"(?<!L)(?<!Lesser )\b(AGPL|GPL|SSPL|BUSL)\b|Affero|Server Side Public", re.IGNORECASE)
_SAID_ELSEWHERE = {
    "runai-model-streamer": "Apache-2.0, says its repository",
    "oss-harmony": "Apache-2.0, says its LICENSE file",
    "prometheus-fastapi-instrumentator": "ISC, says its LICENSE file",
    "setuptools": "MIT, says its LICENSE file",
    "intel-openmp": "Intel Simplified Software License: may be redistributed",
    "intel-cmplr-lib-ur": "Intel Simplified Software License: may be redistributed",
}


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """An advisory that fits a locked version."""

    package: str
    version: str
    advisory: str
    summary: str
    fixed: tuple[str, ...]


def locked(text: str) -> dict[str, str]:
    """The packages of a lock, canonical name -> version."""
    return {canonicalize_name(name): found for name, found in re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ ;\\\n]+)", text)}


def findings(versions: Mapping[str, str], advisories: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Advisories in OSV's format (https://ossf.github.io/osv-schema/) that fit one of `versions`."""
    found = set()
    for advisory in advisories:
        if advisory.get("withdrawn"):
            continue
        for affected in advisory.get("affected", ()):
            about = affected.get("package", {})
            name = canonicalize_name(about.get("name", ""))
            if about.get("ecosystem") == "PyPI" and name in versions and _is_affected(affected, versions[name]):
                summary = str(advisory.get("summary", ""))
                found.add(Finding(name, versions[name], str(advisory["id"]), summary, tuple(_fixed(affected))))
    return sorted(found)


def _is_affected(affected: Mapping[str, Any], version: str) -> bool:
    if version in affected.get("versions", ()):
        return True
    ranges = (one for one in affected.get("ranges", ()) if one.get("type") == "ECOSYSTEM")
    return any(_within(one.get("events", ()), Version(version)) for one in ranges)


def _within(events: Iterable[Mapping[str, str]], version: Version) -> bool:
    """OSV's own algorithm: events in the order of their versions, each of which turns it on or off."""
    said = [(at, kind) for event in events for kind, text in event.items() if (at := _version(text)) is not None]
    inside = False
    for at, kind in sorted(said):
        if kind == "introduced":
            inside = inside or version >= at
        elif kind == "fixed":
            inside = inside and version < at
        elif kind == "last_affected":
            inside = inside and version <= at
    return inside


def _version(text: str) -> Version | None:
    try:
        return Version("0.dev0" if text == "0" else text)
    except InvalidVersion:
        return None


def _fixed(affected: Mapping[str, Any]) -> Iterator[str]:
    for one in affected.get("ranges", ()):
        if one.get("type") == "ECOSYSTEM":
            yield from (event["fixed"] for event in one.get("events", ()) if "fixed" in event)


def advisories_of(export: Path) -> Iterator[Mapping[str, Any]]:
    """The records of OSV's export."""
    with zipfile.ZipFile(export) as folder:
        for name in folder.namelist():
            if name.endswith(".json"):
                yield json.loads(folder.read(name))


def licence_of(name: str) -> str:
    """What an installed package says of its licence; empty when it says nothing, or is not installed."""
    try:
        said = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return ""
    classified = [one.split("::")[-1].strip() for one in said.get_all("Classifier", []) if one.startswith("License ::")]
    expression, text = ((said.get_all(field) or [""])[0] for field in ("License-Expression", "License"))
    return expression or "; ".join(classified) or text.strip().split("\n")[0]


def unfit_licences(packages: Iterable[str]) -> dict[str, str]:
    """Of what is installed: packages that may not be handed on with us, or do not say whether they may."""
    unfit = {}
    for name in packages:
        licence = licence_of(name)
        said = licence not in {"", "UNKNOWN", "OSI Approved", "Other/Proprietary License"}
        if (said and _STRONG_COPYLEFT.search(licence)) or (not said and name not in _SAID_ELSEWHERE):
            unfit[name] = licence or "not said"
    return unfit


def installed(packages: Iterable[str]) -> list[str]:
    """Those of `packages` that are in this environment."""
    there = {canonicalize_name(one.name) for one in metadata.distributions()}
    return sorted(there.intersection(packages))


def _ask_osv(lock: Path) -> int:
    command = [sys.executable, "-m", "pip_audit", "-s", "osv", "--disable-pip", "--no-deps", "-r", str(lock)]
    return subprocess.run(command, timeout=_ASK_TIMEOUT_S, check=False).returncode


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Known vulnerabilities and licences of what is locked.")
    parser.add_argument("--advisories", type=Path, help="OSV's export for PyPI (all.zip); without it OSV is asked")
    parser.add_argument("locks", nargs="*", type=Path, help="requirements/full.lock when none is named")
    asked = parser.parse_args()
    locks = asked.locks or [LOCKS / "full.lock"]
    failed = False
    for lock in locks:
        versions = locked(lock.read_text())
        if asked.advisories is None:
            failed |= _ask_osv(lock) != 0
        else:
            found = findings(versions, advisories_of(asked.advisories))
            for one in found:
                fixed = f"fixed in {', '.join(one.fixed)}" if one.fixed else "no fixed version"
                _say(f"{one.package} {one.version}: {one.advisory} {one.summary} ({fixed})")
            _say(f"{lock.name}: {len(versions)} packages, {len(found)} known vulnerabilities")
            failed |= bool(found)
    shipped = {name for lock in SHIPPED for name in locked((LOCKS / f"{lock}.lock").read_text())}
    there = installed(shipped)
    unfit = unfit_licences(there)
    for name, licence in unfit.items():
        _say(f"{name}: licence {licence}")
    _say(f"licences: {len(there)} of {len(shipped)} packages of the images are installed here, {len(unfit)} are unfit")
    return int(failed or bool(unfit))


if __name__ == "__main__":
    sys.exit(main())
