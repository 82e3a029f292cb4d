"""What is known against a locked version is found without a network, and nothing of a strong copyleft is handed on."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.supply_chain import LOCKS, SHIPPED, Finding, advisories_of, findings, installed, locked, unfit_licences

TORN = "PYSEC-2099-1"


def advisory(*events: dict[str, str], name: str = "Torn_Package", **more: Any) -> dict[str, Any]:
    """In OSV's format, about one package."""
    ranges = [{"type": "ECOSYSTEM", "events": [*events]}]
    affected = [{"package": {"ecosystem": "PyPI", "name": name}, "ranges": ranges}]
    return {"id": TORN, "summary": "it tears", "affected": affected} | more


@pytest.mark.parametrize(
    ("version", "hit"),
    [("1.0", False), ("1.2", True), ("1.9.9", True), ("2.0", False), ("3.0rc1", True), ("3.5", True), ("3.6", False)],
)
def test_an_advisory_fits_the_versions_between_its_events(version: str, hit: bool) -> None:
    known = advisory({"introduced": "1.2"}, {"fixed": "2.0"}, {"introduced": "3.0a1"}, {"last_affected": "3.5"})

    found = findings({"torn-package": version}, [known])

    assert found == ([Finding("torn-package", version, TORN, "it tears", ("2.0",))] if hit else [])


def test_an_advisory_from_the_beginning_fits_until_its_end() -> None:
    known = advisory({"introduced": "0"}, {"fixed": "0.5"})

    assert [len(findings({"torn-package": version}, [known])) for version in ("0.0.1.dev1", "0.4", "0.5")] == [1, 1, 0]


def test_listed_versions_fit_without_a_range() -> None:
    known = advisory() | {
        "affected": [{"package": {"ecosystem": "PyPI", "name": "torn-package"}, "versions": ["1.0.post1"]}]
    }

    assert findings({"torn-package": "1.0.post1"}, [known])
    assert not findings({"torn-package": "1.0"}, [known])


def test_withdrawn_advisories_and_those_of_others_do_not_count() -> None:
    events = ({"introduced": "0"},)

    assert not findings({"torn-package": "1"}, [advisory(*events, withdrawn="2099-01-01T00:00:00Z")])
    assert not findings({"whole-package": "1"}, [advisory(*events)])


def test_an_export_is_read_record_by_record(tmp_path: Path) -> None:
    export = tmp_path / "all.zip"
    with zipfile.ZipFile(export, "w") as folder:
        folder.writestr(f"{TORN}.json", json.dumps(advisory({"introduced": "0"})))

    (found,) = findings(
        locked("torn.package==1.0 \\\n    --hash=sha256:00\nother==2 ; python_version < '4'\n"), advisories_of(export)
    )

    assert found.advisory == TORN


def test_what_the_images_hold_may_be_handed_on() -> None:
    shipped = {name for lock in SHIPPED for name in locked((LOCKS / f"{lock}.lock").read_text())}

    assert unfit_licences(installed(shipped)) == {}
