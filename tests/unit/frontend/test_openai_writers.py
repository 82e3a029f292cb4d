"""What is encoded in advance is what encoding it anew would be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.answer_text import AnswerPiece
from frontend.http_exchange import sse_events
from frontend.inference import Answer, AnswerDelta
from frontend.openai_writers import ChatWriter, CompletionWriter, Head, Wishes
from frontend.tokenizer import TextModel
from tests.support.text_model_folder import byte_level_tokenizer


def answer() -> Answer:
    return Answer("r", "m", 2, [3], iter(()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [ChatWriter, CompletionWriter])
@pytest.mark.parametrize("usage_chunk", [True, False])
def test_events_are_the_encoded_chunks_whatever_the_text(
    kind: type[ChatWriter] | type[CompletionWriter], usage_chunk: bool
) -> None:
    model = TextModel(byte_level_tokenizer())
    head, wishes = Head("r", 7, 'a "text stands here" model'), Wishes(False, usage_chunk, False)

    @given(st.lists(st.tuples(st.integers(0, 1), st.text()), max_size=6))
    def same(pieces: list[tuple[int, str]]) -> None:
        quick, anew = (kind(head, wishes, model) for _ in range(2))
        for index, text in pieces:
            delta = AnswerDelta(index, AnswerPiece(text, (), ()))
            assert quick.events(delta, answer()) == sse_events(list(anew.chunks(delta, answer())))

    same()
