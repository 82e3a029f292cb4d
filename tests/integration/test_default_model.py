"""The default model, as converted on this machine, is SmolLM2: its tokenizer's ids are those of the original."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.default_model import ensure
from slipstream.model_folder import resolve
from slipstream.settings import DEFAULT_MODEL


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure(os.environ)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_name_of_the_default_model_leads_to_its_folder(folder: Path) -> None:
    assert resolve(DEFAULT_MODEL).path == folder


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("<|endoftext|><|im_start|><|im_end|>", [0, 1, 2]),
        ("2024", [34, 32, 34, 36]),  # each digit by itself
    ],
)
def test_text_becomes_the_ids_that_the_model_was_trained_on(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).ids == ids


def test_any_character_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    text = "naïve 東京 🙂 ½ ٣\x00\t\r\n   def f(x):\n\treturn x"

    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_folder_says_how_to_chat_and_when_to_stop(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())

    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert tokenizer_config["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in tokenizer_config["chat_template"]
    assert (folder / "chat_template.jinja").read_text() == tokenizer_config["chat_template"]
