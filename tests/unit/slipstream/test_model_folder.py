"""What a user may write after --model, and what is said when it cannot be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.errors import StartupError
from slipstream.model_folder import default_model_folder, models_cache, resolve
from slipstream.settings import DEFAULT_MODEL


def _fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, with the hub out of reach."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def _cache_snapshot(cache: Path, model: str, *names: str) -> Path:
    """Lay `model` out as the hub's client caches it."""
    repo = cache / f"models--{model.replace('/', '--')}"
    commit = "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return _fill(repo / "snapshots" / commit, *names)


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = _fill(tmp_path / "my-model", "config.json", "tokenizer.json")

    found = resolve(str(folder), environ={})

    assert found.path == folder
    assert found.served_name == "my-model"


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _fill(tmp_path / "my-model", "config.json", "tokenizer.json")
    monkeypatch.chdir(folder)

    assert resolve(".", environ={}) == resolve(str(folder), environ={})


@pytest.mark.parametrize(
    ("present", "named"),
    [
        (["config.json"], "lacks tokenizer.json:"),
        (["tokenizer.json"], "lacks config.json:"),
        ([], "lacks config.json and tokenizer.json:"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_what_it_lacks(
    tmp_path: Path, present: list[str], named: str
) -> None:
    folder = _fill(tmp_path / "half", *present)

    with pytest.raises(StartupError, match=named):
        resolve(str(folder), environ={})


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "with a space"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(model: str) -> None:
    with pytest.raises(StartupError, match="is not a folder: give a folder that holds"):
        resolve(model, environ={})


def test_an_empty_name_does_not_mean_the_current_folder() -> None:
    with pytest.raises(StartupError, match="the model's name is empty"):
        resolve("", environ={})


def test_the_default_model_lives_in_the_users_cache_folder(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"}
    folder = _fill(default_model_folder(environ), "config.json", "tokenizer.json")

    found = resolve(DEFAULT_MODEL, environ=environ)

    assert found.path == folder
    assert folder.is_relative_to(tmp_path / "slipstream" / "models")
    assert found.served_name == DEFAULT_MODEL


def test_without_the_default_model_the_command_that_makes_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="run `make model`"):
        resolve(DEFAULT_MODEL, environ={"HOME": str(tmp_path)})


def test_a_damaged_default_model_is_not_served(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    _fill(default_model_folder(environ), "config.json")

    with pytest.raises(StartupError, match=r"has lost tokenizer\.json: remove the folder and run `make model`"):
        resolve(DEFAULT_MODEL, environ=environ)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/slipstream/models"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/slipstream/models"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/slipstream/models"),
    ],
)
def test_the_cache_folder_follows_the_xdg_rules(environ: dict[str, str], expected: str) -> None:
    assert models_cache(environ) == Path(expected)


def test_without_a_home_the_variables_to_set_are_named() -> None:
    with pytest.raises(StartupError, match="set HOME or XDG_CACHE_HOME"):
        models_cache({})


def test_a_hub_model_in_the_cache_needs_no_network(hub_cache: Path) -> None:
    folder = _cache_snapshot(hub_cache, "org/name", "config.json", "tokenizer.json", "model.safetensors")

    found = resolve("org/name", environ={})

    assert found.path == folder
    assert found.served_name == "org/name"


def test_a_frontend_is_content_with_a_hub_model_that_has_no_weights_here(hub_cache: Path) -> None:
    folder = _cache_snapshot(hub_cache, "org/name", "config.json", "tokenizer.json")

    assert resolve("org/name", weights=False, environ={}).path == folder
    with pytest.raises(StartupError, match=r"has no \*\.safetensors"):
        resolve("org/name", environ={})


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_that_cannot_be_downloaded_is_refused_with_the_ways_out() -> None:
    with pytest.raises(StartupError, match=f"give its folder, or leave --model out to use {DEFAULT_MODEL}"):
        resolve("org/name", environ={})
