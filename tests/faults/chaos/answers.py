"""The prompts of a run and what an undisturbed engine says to them: a pure function, or a plain vLLM, greedily."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.simulated.tokens import Answer, printable_tokens
from frontend.prompts import ChatPrompt
from frontend.tokenizer import TextModel
from tests.faults.chaos.plan import CONVERSATIONS, IDS, TEXTS, TURNS, Form, PlannedRequest, Shape
from tests.support.clear_answers import clear_answers
from tests.support.tiny_model import VOCAB_SIZE

SIMULATED_SEED = 11
_HEAVY = 12
_WORDS = (
    *("river", "leaves", "town", "window", "market", "bread", "bird", "rain", "tree", "weather", "harvest", "child"),
    *("star", "word", "number", "teacher", "morning", "light", "sound", "people", "quick", "brown", "fox", "sea"),
)


Content = str | tuple[int, ...] | tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A prompt.

    Attributes:
        content: as a client sends it.
        answer: the greedy one, as long as answers may be; None: no choice in it is clear enough to be compared.
    """

    content: Content
    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request must be answered. `text` is what precedes the stop string, where there is one."""

    token_ids: tuple[int, ...]
    text: str
    stop: str
    finish_reason: str


class Pool:
    """All prompts of a run, by form."""

    def __init__(self, entries: dict[Form, list[Entry]], text_model: TextModel) -> None:
        self._entries = entries
        self._text_model = text_model

    def entry(self, form: Form, which: int) -> Entry:
        """That prompt, or the next one that can be compared."""
        mine = self._entries[form]
        for step in range(len(mine)):
            found = mine[(which + step) % len(mine)]
            if found.answer is not None:
                return found
        raise AssertionError(f"no prompt given as {form} has a clear answer")

    def expected(self, planned: PlannedRequest) -> Expected:
        answer = self.entry(planned.form, planned.which).answer
        assert answer is not None
        token_ids = answer[: planned.max_tokens]
        text = self.text(token_ids)
        if planned.stop_at is not None and len(text) > 2:
            at = min(int(planned.stop_at * len(text)), len(text) - 2)
            stop = text[at : at + 4]
            return Expected(token_ids, text[: text.index(stop)], stop, "stop")
        return Expected(token_ids, text, "", "length")

    def text(self, token_ids: Sequence[int]) -> str:
        return self._text_model.decode(token_ids)

    @property
    def unclear(self) -> int:
        return sum(entry.answer is None for mine in self._entries.values() for entry in mine)


def make_pool(seed: int, shape: Shape, model: Path, folder: Path) -> Pool:
    """Draw the prompts, and have them answered."""
    text_model = TextModel.load(model)
    contents = _contents(random.Random(f"{seed}:prompts"), longest=800 if shape.engine == "vllm" else 1400)
    prompts = {form: [_tokens(text_model, one) for one in mine] for form, mine in contents.items()}
    flat = [prompt for mine in prompts.values() for prompt in mine]
    if shape.engine == "vllm":
        pairs = clear_answers(model, flat, shape.longest_answer, folder)
        found = {tuple(prompt): tuple(answer) for prompt, answer in pairs}
    else:
        words = printable_tokens(model)
        found = {prompt: _simulated(prompt, words, shape.longest_answer) for prompt in flat}
    entries = {
        form: [Entry(content, prompt, found.get(prompt)) for content, prompt in zip(mine, prompts[form], strict=True)]
        for form, mine in contents.items()
    }
    return Pool(entries, text_model)


def _contents(rng: random.Random, *, longest: int) -> dict[Form, list[Content]]:
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((40, 64, 200, longest // 2)))] for _ in range(6)]
    ids: list[Content] = [
        tuple(rng.choice(stems) + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, longest // 3))])
        for _ in range(IDS - _HEAVY)
    ]
    ids += [
        tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(longest * 3 // 4, longest)))
        for _ in range(_HEAVY)
    ]
    beginnings = [_text(rng, 40) for _ in range(4)]
    texts: list[Content] = [rng.choice(beginnings) + " " + _text(rng, rng.randrange(1, 60)) for _ in range(TEXTS)]
    chats: list[Content] = []
    for _ in range(CONVERSATIONS):
        messages = [{"role": "system", "content": rng.choice(beginnings)}]
        for _ in range(TURNS):
            messages.append({"role": "user", "content": _text(rng, rng.randrange(3, 25))})
            chats.append(tuple(messages))
            messages.append({"role": "assistant", "content": _text(rng, rng.randrange(3, 25))})
    return {Form.IDS: ids, Form.TEXT: texts, Form.CHAT: chats}


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _tokens(text_model: TextModel, content: Content) -> tuple[int, ...]:
    """As a frontend makes them."""
    if isinstance(content, str):
        return tuple(text_model.encode_now(content, add_special_tokens=True))
    messages = [one for one in content if isinstance(one, dict)]
    if not messages:
        return tuple(one for one in content if isinstance(one, int))
    rendered = ChatPrompt(messages).render(text_model.chat_template)
    return tuple(text_model.encode_now(rendered, add_special_tokens=False))


def _simulated(prompt: tuple[int, ...], words: list[int], tokens: int) -> tuple[int, ...]:
    answer = Answer(array("I", prompt), SIMULATED_SEED, words)
    return tuple(answer.next() for _ in range(tokens))
