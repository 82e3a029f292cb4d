"""The key file: read with care, written whole, reread when it changes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from frontend.keys import edits, key_file, metrics
from frontend.keys.entries import KeyFile
from frontend.keys.guard import Guard
from frontend.keys.keyring import RefusedKeyError
from frontend.keys.opening import guarding
from frontend.keys.secret import NewKey, new_key
from slipstream.errors import ConfigError
from slipstream.security_settings import SecuritySettings
from slipstream.settings import Settings
from tests.support.cluster import eventually
from tests.unit.frontend.keys.faces import content, entry
from tests.unit.frontend.keys.test_keys import NOW, WANTED


def test_what_is_written_is_read_again_as_yaml_and_json(tmp_path: Path) -> None:
    rich = content(
        entry(new_key(), tenant="a", limits={"streams": 2}, expires=NOW, name="für é\u2028", models=["m*"]),
        entry(new_key(), classes=["batch"]),
        tenants=[{"name": "a", "weight": 2}],
    )
    for name in ("keys.yaml", "keys.json"):
        path = tmp_path / "new folder" / name
        with key_file.changing(path) as versions:
            assert versions == [KeyFile()]
            versions.append(rich)
        assert key_file.read(path) == rich
        assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / "new folder" / "keys.json").read_text())["version"] == 1


def test_keys_made_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"

    def make() -> None:
        with key_file.changing(path) as versions:
            versions.append(edits.created(versions[-1], WANTED, new_key(), NOW).content)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert len(key_file.read(path).keys) == 8
    assert {one.name for one in tmp_path.iterdir()} == {"keys.yaml", ".keys.yaml.lock"}, "nothing is left over"


def test_a_change_keeps_who_may_read_the_file_and_goes_through_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("version: 1\n")
    real.chmod(0o640)
    link.symlink_to(real)
    with key_file.changing(link) as versions:
        versions.append(content(entry(new_key())))
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert len(key_file.read(real).keys) == 1


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("version: 1\n")
    path.chmod(0o606)
    with pytest.raises(ConfigError, match="everybody on this machine may write"):
        key_file.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "keys: 3",
        "keys: [{id: x}]",
        "version: 2",
        "keys: []\nkeys: []",
        "keys: [&a {id: x}, *a]",
        "{broken",
        "keys: [{id: aaaaaaaaaaaa, sha256: SECRET}]",
        "SECRET: 1",
        "\x00",
    ],
)
def test_what_is_wrong_is_said_without_what_may_be_a_key(tmp_path: Path, text: str) -> None:
    key = new_key()
    path = tmp_path / "keys.yaml"
    path.write_text(text.replace("SECRET", key.plain))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        key_file.read(path)
    assert "keys.yaml" in caught.value.message
    assert key.plain not in caught.value.message


def write(path: Path, *keys: NewKey) -> None:
    """As an editor or `kubectl` would: another file in the place of this one."""
    new = path.with_suffix(".new")
    new.write_text(key_file.as_text(content(*(entry(one) for one in keys))))
    new.chmod(0o600)
    new.replace(path)


async def until(condition: Callable[[], object]) -> None:
    await eventually("the file is reread", condition, timeout_s=10, every_s=0.01)


def settings(path: Path, every_s: float = 0.05) -> Settings:
    return Settings(security=SecuritySettings(keys_file=path, keys_check_s=every_s))


def knows(guard: Guard, key: NewKey) -> bool:
    try:
        guard.keyring.find(key.plain, 0.0)
    except RefusedKeyError:
        return False
    return True


async def test_changes_hold_without_a_restart_and_a_broken_file_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, first, second = tmp_path / "keys.yaml", new_key(), new_key()
    write(path, first)
    async with guarding(settings(path)) as guard:
        assert guard is not None
        assert knows(guard, first)
        write(path, second)
        await until(lambda: knows(guard, second))
        assert not knows(guard, first)
        path.write_text(f"keys: [{{id: {second.plain}}}]")
        await until(lambda: metrics.FILE_GOOD._value.get() == 0)
        assert knows(guard, second)
        path.unlink()
        await asyncio.sleep(0.2)
        assert knows(guard, second)
        write(path, first, second)
        await until(lambda: knows(guard, first))
        assert metrics.FILE_GOOD._value.get() == 1
    told = capsys.readouterr().out
    assert "keys_file_refused" in told
    assert second.plain not in told


async def test_a_secrets_folder_in_kubernetes_is_swapped_as_a_link(tmp_path: Path) -> None:
    first, second = new_key(), new_key()
    for name, key in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.yaml", key)
    stamp = 1_700_000_000_000_000_000
    for name in ("one", "two"):  # the same size and times: only the file is another
        os.utime(tmp_path / name / "keys.yaml", ns=(stamp, stamp))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    async with guarding(settings(tmp_path / "keys.yaml")) as guard:
        assert guard is not None
        assert knows(guard, first)
        (tmp_path / "..data_tmp").symlink_to("two")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        await until(lambda: knows(guard, second))


async def test_sighup_has_it_read_at_once(tmp_path: Path) -> None:
    path, first, second = tmp_path / "keys.yaml", new_key(), new_key()
    write(path, first)
    async with guarding(settings(path, every_s=3600)) as guard:
        assert guard is not None
        write(path, second)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: knows(guard, second))


async def test_a_file_that_cannot_be_used_at_the_start_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        async with guarding(settings(tmp_path / "nothing.yaml")):
            pass


async def test_without_a_file_there_is_no_guard() -> None:
    async with guarding(Settings()) as guard:
        assert guard is None
