"""`slipstream prefetch`: from a folder and from a hub, into the cache and into memory; it says what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.page_cache import warm
from tests.unit.slipstream.hub_server import COMMIT, Hub, serving

REPO = "acme/parrot"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 300_000,
    "model-00002-of-00002.safetensors": b"b" * 200_000,
    "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted",
}
WANTED = 500_004


def prefetch(*arguments: str, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SLIPSTREAM_"))},
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "slipstream", "prefetch", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_model_of_the_hub_is_fetched_checked_and_read_into_memory_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with serving(Hub(REPO, FILES)) as hub:
        first = prefetch(REPO, "--folder", str(folder), "--json", hub=hub.url, home=tmp_path)
        assert first.returncode == 0, first.stderr
        asked = sorted(hub.fetched)
        again = prefetch(REPO, "--folder", str(folder), hub=hub.url, home=tmp_path)
        assert sorted(hub.fetched) == asked
    (done,) = json.loads(first.stdout)

    assert asked == sorted(name for name, content in FILES.items() if content != b"not wanted")
    assert done["folder"] == str(folder / f"acme--parrot@{COMMIT[:16]}")
    assert (done["size_bytes"], done["fetched_bytes"], done["warmed_bytes"]) == (WANTED, WANTED, 500_000)
    assert "was there" in again.stdout

    # The hub is gone now: what is in the cache is served.
    without = prefetch(REPO, "--folder", str(folder), "--json", hub=hub.url, home=tmp_path)
    assert without.returncode == 0, without.stderr
    assert json.loads(without.stdout)[0]["fetched_bytes"] == 0


def test_bytes_that_are_not_what_the_hub_says_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with serving(Hub(REPO, FILES, lied={"model-00001-of-00002.safetensors"})) as hub:
        done = prefetch(REPO, "--folder", str(folder), hub=hub.url, home=tmp_path)

    assert done.returncode == 1
    assert "arrived with SHA-256" in done.stderr
    assert list(folder.glob("[!.]*@*")) == []


def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    with serving(Hub(REPO, FILES)) as hub:
        done = prefetch("acme/other", "--folder", str(tmp_path / "cache"), hub=hub.url, home=tmp_path)

    assert done.returncode == 1
    assert "neither a folder here nor a model of the hub" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_larger_than_memory_are_not_read_and_that_is_said(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"w" * 1000)

    assert (
        warm([file], readers=2, available_bytes=lambda: 999).skipped == "1000 bytes do not fit into 999 bytes of memory"
    )


@pytest.mark.parametrize("readers", [1, 8])
def test_every_byte_of_many_pieces_is_read(tmp_path: Path, readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.page_cache._PIECE_BYTES", 1000)
    monkeypatch.setattr("slipstream.page_cache._READ_BYTES", 300)
    sizes = (0, 1, 999, 1000, 1001, 12_345)
    files = [tmp_path / str(size) for size in sizes]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(b"w" * size)

    assert warm(files, readers=readers).size_bytes == sum(sizes)
