"""The cache of models on a local disk: whole or not at all, once for all, within limits, never what is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slipstream import model_cache, model_source
from slipstream.errors import StartupError
from slipstream.model_cache import MANIFEST, ModelCache, local_model, release_all
from slipstream.settings import Settings
from slipstream.worker_settings import ModelCacheSettings

WEIGHTS = 4096


@pytest.fixture(autouse=True)
def _no_entry_stays_held() -> None:
    release_all()


def a_model(folder: Path, *, weights: bytes = b"w" * WEIGHTS) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "training.log").write_text("not served")
    return folder


def a_cache(tmp_path: Path, *, free_bytes: int = 1 << 40, **changes: object) -> ModelCache:
    settings = ModelCacheSettings(**{"spare_bytes": 0, "timeout_s": 5.0, **changes})
    ticks = iter(range(1_000_000, 2_000_000))
    return ModelCache(settings, tmp_path / "cache", clock=lambda: next(ticks), free_bytes=lambda _: free_bytes)


def names(cache: ModelCache) -> list[str]:
    return [entry.name.partition("@")[0] for entry in cache.entries()]


def test_a_model_is_copied_once_and_found_after_that(tmp_path: Path) -> None:
    model, cache = a_model(tmp_path / "a"), a_cache(tmp_path)

    first, second = cache.ensure(str(model), {}), cache.ensure(str(model), {})

    assert first.folder == second.folder
    assert (first.fetched_bytes, second.fetched_bytes) == (WEIGHTS + 4, 0)
    assert sorted(path.name for path in first.folder.iterdir()) == [
        MANIFEST,
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert first.served_name == "a"


def test_a_model_that_changed_gets_an_entry_of_its_own(tmp_path: Path) -> None:
    model, cache = a_model(tmp_path / "a"), a_cache(tmp_path)
    old = cache.ensure(str(model), {})
    (model / "model.safetensors").write_bytes(b"other")

    new = cache.ensure(str(model), {})

    assert new.folder != old.folder
    assert (new.folder / "model.safetensors").read_bytes() == b"other"


def test_what_was_cut_short_or_lost_is_fetched_again(tmp_path: Path) -> None:
    model, cache = a_model(tmp_path / "a"), a_cache(tmp_path)
    kept = cache.ensure(str(model), {}).folder / "model.safetensors"
    kept.write_bytes(b"short")

    assert cache.ensure(str(model), {}).fetched_bytes > 0
    assert kept.stat().st_size == WEIGHTS


def test_wrong_bytes_of_the_right_size_are_found_when_asked_for(tmp_path: Path) -> None:
    model, cache = a_model(tmp_path / "a"), a_cache(tmp_path)
    kept = cache.ensure(str(model), {}).folder / "model.safetensors"
    kept.write_bytes(b"x" * WEIGHTS)

    assert cache.ensure(str(model), {}).fetched_bytes == 0
    assert cache.ensure(str(model), {}, verify=True).fetched_bytes > 0
    assert kept.read_bytes() == b"w" * WEIGHTS


def test_an_interrupted_copy_leaves_nothing_that_could_be_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = a_model(tmp_path / "a"), a_cache(tmp_path)

    def broken(*_: object, **__: object) -> dict[str, str]:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(model_cache, "fetch", broken)
        with pytest.raises(StartupError, match="the disk is gone"):
            cache.ensure(str(model), {})
    assert cache.entries() == []
    assert cache.ensure(str(model), {}).fetched_bytes > 0


def test_those_used_longest_ago_make_room(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, limit_bytes=2 * (WEIGHTS + 4) + 100)
    for name in ("a", "b"):
        cache.ensure(str(a_model(tmp_path / name)), {})
    cache.ensure(str(tmp_path / "a"), {})  # used again: b is the older one now
    release_all()

    entry = cache.ensure(str(a_model(tmp_path / "c")), {})

    assert [name.partition("@")[0] for name in entry.evicted] == ["b"]
    assert names(cache) == ["a", "c"]


def test_a_model_in_use_by_another_process_is_not_evicted(tmp_path: Path) -> None:
    limit = WEIGHTS + 1000
    program = """
import sys
from pathlib import Path
from slipstream.model_cache import ModelCache
from slipstream.worker_settings import ModelCacheSettings
ModelCache(ModelCacheSettings(spare_bytes=0), Path(sys.argv[1])).ensure(sys.argv[2], {})
print("held", flush=True)
sys.stdin.read()
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "cache"), str(a_model(tmp_path / "a"))]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        while (line := user.stdout.readline()) != "held\n":
            assert line, "it ended"
        cache = a_cache(tmp_path, limit_bytes=limit)
        with pytest.raises(StartupError, match="are in use"):
            cache.ensure(str(a_model(tmp_path / "b")), {})
        assert names(cache) == ["a"]
        user.kill()
    assert cache.ensure(str(tmp_path / "b"), {}).evicted != ()


@pytest.mark.parametrize(
    ("changes", "free_bytes", "field"),
    [
        ({"limit_bytes": 100}, 1 << 40, "model_cache.limit_bytes"),
        ({}, 100, "model_cache.folder: no room"),
        ({"spare_bytes": 1 << 40}, 1 << 40, "model_cache.spare_bytes"),
    ],
)
def test_no_room_is_told_before_anything_is_copied(
    tmp_path: Path, changes: dict[str, object], free_bytes: int, field: str
) -> None:
    cache = a_cache(tmp_path, free_bytes=free_bytes, **changes)
    with pytest.raises(StartupError, match=field):
        cache.ensure(str(a_model(tmp_path / "a")), {})
    assert cache.entries() == []


def test_of_two_that_ask_at_once_one_copies_and_the_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = str(a_model(tmp_path / "a")), a_cache(tmp_path)
    copies = []

    def slow(*arguments: object, **named: object) -> dict[str, str]:
        copies.append(1)
        time.sleep(0.2)
        return model_source.fetch(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(model_cache, "fetch", slow)
    threads = [threading.Thread(target=cache.ensure, args=(model, {})) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert copies == [1]


def test_a_wait_for_another_ends_with_the_setting_that_says_how_long(tmp_path: Path) -> None:
    model, cache = str(a_model(tmp_path / "a")), a_cache(tmp_path, timeout_s=0.3)
    name = cache.ensure(model, {}).folder.name
    with cache._only_one(name), pytest.raises(StartupError, match=r"model_cache\.timeout_s"):
        cache.ensure(model, {})


def test_a_worker_takes_its_model_from_the_cache_only_when_one_is_set(tmp_path: Path) -> None:
    model = a_model(tmp_path / "a")
    plain = Settings(model=str(model))
    cached = Settings(model=str(model), model_cache=ModelCacheSettings(folder=tmp_path / "cache"))

    assert local_model(plain, os.environ).path == model
    found = local_model(cached, os.environ)
    assert found.path.parent == tmp_path / "cache"
    assert found.served_name == "a"
