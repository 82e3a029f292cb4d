"""Laws of incremental detokenization and of stop strings."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from frontend.detokenizer import Detokenizer, StopStrings, WindowDetokenizer
from frontend.token_bytes import byte_rule
from frontend.tokenizer import TextModel
from tests.support.text_model_folder import byte_level_tokenizer


def sentencepiece_tokenizer(*, strip: bool = True) -> Tokenizer:
    """A vocabulary as Llama 2 has it: words with a metaspace, bytes for the rest."""
    words = ["▁hello", "▁wor", "ld", "▁", "▁▁", "é", ",", "▁a", "a", "<s>"]
    vocab = {word: place for place, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    vocab = {word: place for place, word in enumerate(["[UNK]", "hello", "world", "##s", "##ly", "a"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


BYTE_LEVEL = TextModel(byte_level_tokenizer())
SENTENCEPIECE = TextModel(sentencepiece_tokenizer())
SENTENCEPIECE_NO_STRIP = TextModel(sentencepiece_tokenizer(strip=False))
WORDPIECE = TextModel(wordpiece_tokenizer())


def joined(detokenizer: Detokenizer, token_ids: list[int]) -> str:
    return "".join([*map(detokenizer.push, token_ids), detokenizer.finish()])


def any_tokens(text_model: TextModel) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, text_model.vocab_size - 1), max_size=40)


def tokens_of_text(text_model: TextModel) -> st.SearchStrategy[list[int]]:
    """Tokens whose bytes are mostly text, characters split over several of them included."""
    whole = [token for token in range(text_model.vocab_size) if "\ufffd" not in text_model.decode([token])]
    character = st.characters(codec="utf-8").map(lambda one: text_model.encode_now(one, add_special_tokens=False))
    parts = st.lists(st.one_of(st.sampled_from(whole).map(lambda token: [token]), character), max_size=20)
    return parts.map(lambda lists: [token for part in lists for token in part])


@given(any_tokens(BYTE_LEVEL))
def test_byte_level_pieces_join_to_the_whole_for_any_tokens_valid_text_or_not(token_ids: list[int]) -> None:
    assert joined(BYTE_LEVEL.detokenizer(), token_ids) == BYTE_LEVEL.decode(token_ids)


@given(st.text())
def test_byte_level_pieces_join_to_the_text_that_was_encoded(text: str) -> None:
    assert joined(BYTE_LEVEL.detokenizer(), BYTE_LEVEL.encode_now(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("text_model", [SENTENCEPIECE, SENTENCEPIECE_NO_STRIP], ids=["strip", "no strip"])
def test_sentencepiece_pieces_join_to_the_whole_wherever_the_bytes_are_text(text_model: TextModel) -> None:
    @given(tokens_of_text(text_model))
    def law(token_ids: list[int]) -> None:
        whole = text_model.decode(token_ids)
        # Of bytes that are no text the library makes one U+FFFD each for the whole run, which no stream can know.
        assume("\ufffd" not in whole)
        assert joined(text_model.detokenizer(), token_ids) == whole

    law()


@given(st.text(max_size=20))
def test_sentencepiece_bytes_split_over_tokens_are_the_character(text: str) -> None:
    first = SENTENCEPIECE.token_bytes(10)
    assert first == b"\x00", "the byte tokens follow the ten words"
    ids_of_bytes = [10 + byte for byte in text.encode()]
    assert joined(SENTENCEPIECE.detokenizer(), ids_of_bytes) == text.removeprefix(" ")


@pytest.mark.parametrize("text_model", [BYTE_LEVEL, SENTENCEPIECE, WORDPIECE], ids=["bytes", "pieces", "words"])
def test_windows_join_to_the_whole_for_any_decoder(text_model: TextModel) -> None:
    @given(tokens_of_text(text_model))
    def law(token_ids: list[int]) -> None:
        whole = text_model.decode(token_ids)
        assume("\ufffd" not in whole)
        assert joined(WindowDetokenizer(text_model.decode), token_ids) == whole

    law()


def test_a_decoder_that_is_no_matter_of_bytes_gets_windows() -> None:
    assert isinstance(WORDPIECE.detokenizer(), WindowDetokenizer)
    assert joined(WORDPIECE.detokenizer(), [1, 3, 2]) == "hellos world"
    assert byte_rule(None) is None


def test_nothing_is_shown_of_a_character_until_it_is_whole() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    ids = BYTE_LEVEL.encode_now("a🙂b", add_special_tokens=False)
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "", "", "🙂", "b"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    detokenizer = BYTE_LEVEL.detokenizer()
    assert detokenizer.push(BYTE_LEVEL.encode_now("🙂", add_special_tokens=False)[0]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_and_ids_beyond_the_vocabulary_add_no_text() -> None:
    special = max(BYTE_LEVEL.special_token_ids)
    assert joined(BYTE_LEVEL.detokenizer(), [special, BYTE_LEVEL.vocab_size + 5]) == ""


def test_an_added_token_reads_as_it_is_spelled() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<｜tool▁call｜>", normalized=False)])
    text_model = TextModel(tokenizer)
    [token_id] = text_model.encode_now("<｜tool▁call｜>", add_special_tokens=False)
    assert joined(text_model.detokenizer(), [token_id]) == "<｜tool▁call｜>"


def test_the_rule_for_a_byte_level_decoder_inside_a_sequence_is_found() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    rule = byte_rule(json.loads(tokenizer.to_str())["decoder"])
    assert rule is not None
    assert rule.to_bytes("Ġa") == b" a"


# A small alphabet, so that stop strings begin, break off and overlap all the time.
TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """The law by brute force: grow the text by a character until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(TEXTS, STOPS, st.data())
def test_the_text_let_through_is_the_whole_cut_before_the_first_stop_for_any_split(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    watch = StopStrings(stops)
    shown, rest, stopped = "", text, None
    while rest and stopped is None:
        size = data.draw(st.integers(1, len(rest)))
        released = watch.push(rest[:size])
        shown, rest, stopped = shown + released.text, rest[size:], released.stop
    if stopped is None:
        shown += watch.finish()
    assert shown == cut(text, stops)
    assert (stopped is not None) == any(stop in text for stop in stops)


@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    watch = StopStrings(stops)
    released = watch.push(text)
    assume(released.stop is None)
    held = watch.finish()
    assert released.text + held == text
    assert held == "" or any(stop.startswith(held) for stop in stops)
