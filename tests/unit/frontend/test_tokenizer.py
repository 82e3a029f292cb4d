"""Model folders as they are found in the wild."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from frontend.tokenizer import TextModel
from slipstream.errors import StartupError
from tests.support.text_model_folder import BOS, EOS, IM_END, write_model_folder


def id_of(folder: Path, token: str) -> int:
    token_id = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    assert token_id is not None
    return token_id


def test_completions_get_the_special_tokens_and_rendered_chats_do_not(tmp_path: Path) -> None:
    model = TextModel.load(write_model_folder(tmp_path))
    plain = model.encode_now("hello", add_special_tokens=False)
    assert model.encode_now("hello", add_special_tokens=True) == [id_of(tmp_path, BOS), *plain]


def test_named_special_tokens_are_special_even_if_the_tokenizer_file_does_not_say_so(tmp_path: Path) -> None:
    names = {"eos_token": "h", "pad_token": {"content": "<pad>"}}
    model = TextModel.load(write_model_folder(tmp_path, tokenizer_config=names))
    [pad] = model.encode_now("<pad>", add_special_tokens=False)
    assert pad in model.special_token_ids
    assert id_of(tmp_path, "h") in model.special_token_ids
    assert model.decode([pad]) == ""


@pytest.mark.parametrize(
    ("generation", "config", "own", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, {}, {5}),
        ({"eos_token_id": [5, 7]}, {}, {}, {5, 7}),
        ({}, {"eos_token_id": [6]}, {}, {6}),
        ({}, {"text_config": {"eos_token_id": 6}}, {}, {6}),
        ({"eos_token_id": None}, {}, {}, set()),
    ],
)
def test_every_declared_end_of_sequence_counts(
    tmp_path: Path, generation: object, config: object, own: object, expected: set[int]
) -> None:
    files = {"generation_config": generation, "config": config, "tokenizer_config": own}
    model = TextModel.load(write_model_folder(tmp_path, **files))  # type: ignore[arg-type]
    assert model.eos_token_ids == expected


def test_the_tokenizers_own_end_of_sequence_counts_too(tmp_path: Path) -> None:
    model = TextModel.load(write_model_folder(tmp_path))
    assert model.eos_token_ids == {id_of(tmp_path, EOS), id_of(tmp_path, IM_END)}


def test_what_the_models_authors_recommend_is_read_and_nothing_else(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_k": 20, "do_sample": True, "max_new_tokens": 5, "top_p": None, "min_p": True}
    model = TextModel.load(write_model_folder(tmp_path, generation_config=generation))
    assert model.sampling_defaults == {"temperature": 0.6, "top_k": 20}


def test_truncation_and_padding_saved_with_a_tokenizer_are_turned_off(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert len(TextModel.load(tmp_path).encode_now("x" * 20, add_special_tokens=False)) == 20


async def test_a_long_text_is_encoded_the_same_off_the_loop(tmp_path: Path) -> None:
    model = TextModel.load(write_model_folder(tmp_path))
    text = "hello world " * 2000
    assert await model.encode(text, add_special_tokens=True) == model.encode_now(text, add_special_tokens=True)


@pytest.mark.parametrize(
    ("config", "own", "expected"),
    [
        ({"max_position_embeddings": 2048, "vocab_size": 512}, {}, (2048, 512)),
        ({"text_config": {"max_position_embeddings": 64, "vocab_size": 300}}, {}, (64, 300)),
        ({}, {"model_max_length": 128}, (128, 267)),
        ({}, {"model_max_length": 1e30}, (None, 267)),
    ],
)
def test_limits_come_from_the_models_own_files(
    tmp_path: Path, config: object, own: object, expected: tuple[int | None, int]
) -> None:
    files = {"config": config, "tokenizer_config": own}
    model = TextModel.load(write_model_folder(tmp_path, **files))  # type: ignore[arg-type]
    assert (model.max_length, model.vocab_size) == expected


def test_the_template_may_be_a_field_of_the_tokenizer_config(tmp_path: Path) -> None:
    for stored, expected in (
        ("plain", "plain"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ):
        write_model_folder(tmp_path, tokenizer_config={"chat_template": stored})
        (tmp_path / "chat_template.jinja").unlink()
        template = TextModel.load(tmp_path).chat_template
        assert template is not None
        assert template.render([{"role": "user", "content": "x"}]) == expected


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert TextModel.load(tmp_path).chat_template is None


def test_token_bytes_spell_special_tokens_and_parts_of_characters(tmp_path: Path) -> None:
    model = TextModel.load(write_model_folder(tmp_path))
    assert model.token_bytes(id_of(tmp_path, EOS)) == EOS.encode()
    assert b"".join(map(model.token_bytes, model.encode_now("é ", add_special_tokens=False))) == "é ".encode()
    assert model.token_bytes(10**6) == b""


def test_a_folder_without_a_tokenizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"has no tokenizer\.json; save one with"):
        TextModel.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    write_model_folder(tmp_path)
    (tmp_path / name).write_text("{broken")
    with pytest.raises(StartupError, match=name):
        TextModel.load(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(StartupError, match="not a JSON object"):
        TextModel.load(tmp_path)
