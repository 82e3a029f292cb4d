"""NIXL in a folder of its own: what happens where it cannot be had, and what is left behind then (nothing)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import nixl_install
from slipstream.errors import UnavailableError


def environ(cache: Path) -> dict[str, str]:
    # pip finds no registry and no folder of wheels here.
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    return {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(cache), **unreachable}


async def test_without_a_registry_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    with pytest.raises(UnavailableError, match=r"installing nixl ended with exit code 1:\n(.*\n)*.*nixl"):
        await nixl_install.installed(environ(cache), tmp_path)

    assert list(nixl_install.install_folder(environ(cache)).parent.iterdir()) == []


async def test_an_install_that_does_not_import_is_not_used(tmp_path: Path) -> None:
    folder = nixl_install.install_folder(environ(tmp_path / "cache"))
    (folder / "nixl").mkdir(parents=True)
    (folder / "nixl" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')")

    with pytest.raises(UnavailableError, match=r"importing nixl ended with exit code 1:\n(.*\n)*.*libcuda.so.1"):
        await nixl_install.installed(environ(tmp_path / "cache"), tmp_path)


async def test_what_is_there_and_works_is_used_without_a_registry(tmp_path: Path) -> None:
    folder = nixl_install.install_folder(environ(tmp_path / "cache"))
    (folder / "nixl").mkdir(parents=True)
    for name in ("__init__", "_api", "_bindings"):
        (folder / "nixl" / f"{name}.py").touch()

    assert await nixl_install.installed(environ(tmp_path / "cache"), tmp_path) == folder


async def test_a_cache_folder_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    occupied = tmp_path / "a-file"
    occupied.touch()

    with pytest.raises(UnavailableError, match="nixl cannot be installed below"):
        await nixl_install.installed(environ(occupied), tmp_path)


def test_the_folder_comes_first_on_the_path_and_the_rest_stays() -> None:
    assert nixl_install.with_path({"PYTHONPATH": "/a", "X": "y"}, Path("/n")) == {"PYTHONPATH": "/n:/a", "X": "y"}
    assert nixl_install.with_path({}, Path("/n")) == {"PYTHONPATH": "/n"}
