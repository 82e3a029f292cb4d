"""One answer: which text and which tokens are shown, and what counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from frontend.answer_text import AnswerPiece, AnswerText
from frontend.generation import TokenDelta
from frontend.tokenizer import TextModel
from slipstream.v1.sampling_pb2 import FinishReason
from tests.support.text_model_folder import byte_level_tokenizer

MODEL = TextModel(byte_level_tokenizer())
EOS = max(MODEL.special_token_ids)
STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


def ids_of(text: str) -> list[int]:
    return MODEL.encode_now(text, add_special_tokens=False)


def answer(**fields: object) -> AnswerText:
    return AnswerText(MODEL.detokenizer(), **fields)  # type: ignore[arg-type]


def fed(text: AnswerText, deltas: Sequence[TokenDelta]) -> list[AnswerPiece]:
    pieces = []
    for delta in deltas:
        pieces.append(text.feed(delta))
        if pieces[-1].finished:
            break
    return pieces


@given(st.text("xyé", min_size=1), st.lists(st.text("xyé", min_size=1, max_size=3), max_size=3), st.data())
def test_text_and_shown_tokens_do_not_depend_on_how_the_tokens_were_bundled(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    ids = ids_of(text)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {0, len(ids)})
    bundles = [ids[start:end] for start, end in pairwise(cuts)]
    bundled = [TokenDelta(bundle) for bundle in bundles[:-1]] + [TokenDelta(bundles[-1], finish_reason=LENGTH)]
    single = [TokenDelta([one]) for one in ids[:-1]] + [TokenDelta(ids[-1:], finish_reason=LENGTH)]

    outcomes = []
    for deltas in (bundled, single):
        whole = answer(stop=stops)
        pieces = fed(whole, deltas)
        shown = [token for piece in pieces for token in piece.shown]
        outcomes.append(
            ("".join(piece.text for piece in pieces), shown, whole.completion_tokens, pieces[-1].stop_reason)
        )
    assert outcomes[0] == outcomes[1]


def test_the_end_of_sequence_token_counts_but_is_not_shown() -> None:
    text = answer(stop_token_ids=[EOS])
    piece = text.feed(TokenDelta([*ids_of("hi"), EOS], finish_reason=STOP, stop_reason=str(EOS)))
    assert piece.text == "hi"
    assert [token.token_id for token in piece.shown] == ids_of("hi")
    assert [token.token_id for token in piece.arrived] == [*ids_of("hi"), EOS]
    assert text.completion_tokens == 3


def test_an_ordinary_stop_token_is_not_part_of_the_text() -> None:
    piece = answer(stop_token_ids=ids_of("!")).feed(TokenDelta(ids_of("hi!"), finish_reason=STOP))
    assert piece.text == "hi"


def test_a_stop_token_in_the_middle_is_text_when_it_did_not_stop() -> None:
    piece = answer(stop_token_ids=ids_of("!")).feed(TokenDelta(ids_of("a!b"), finish_reason=LENGTH))
    assert piece.text == "a!b"


def test_tokens_behind_the_one_that_completes_a_stop_string_do_not_count() -> None:
    text = answer(stop=["bc"])
    piece = text.feed(TokenDelta(ids_of("abcdef")))
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("a", STOP, "bc")
    assert text.completion_tokens == len(piece.arrived) == 3
    assert [token.token_id for token in piece.shown] == ids_of("a")


def test_held_text_and_its_tokens_come_at_the_end() -> None:
    text = answer(stop=["bcd"])
    first = text.feed(TokenDelta(ids_of("abc")))
    assert (first.text, len(first.shown)) == ("a", 1)
    end = text.feed(TokenDelta([], finish_reason=LENGTH))
    assert (end.text, len(end.shown)) == ("bc", 2)


def test_stop_strings_wait_for_min_tokens() -> None:
    text = answer(stop=["a"], min_tokens=2)
    piece = text.feed(TokenDelta(ids_of("aabba")))
    assert (piece.text, text.completion_tokens) == ("aabb", 5)


def test_offsets_say_where_a_tokens_text_begins_also_within_a_character() -> None:
    piece = answer().feed(TokenDelta(ids_of("aéb"), finish_reason=LENGTH))
    assert [token.text_offset for token in piece.shown] == [0, 1, 1, 2]
