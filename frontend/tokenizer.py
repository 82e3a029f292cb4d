"""The text side of a model: its tokenizer, chat template, end-of-sequence ids and limits, from its folder.

Read with the `tokenizers` library and json alone; transformers would cost seconds and hundreds of megabytes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from frontend.chat_template import ChatTemplate, read_template
from frontend.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from frontend.token_bytes import byte_rule
from frontend.word_tokens import WordTokens, is_wordwise
from slipstream.errors import StartupError

# Shorter texts take less time to encode than a thread takes to wake up.
_INLINE_CHARACTERS = 4096
# As long as it takes the library to encode those: a text whose words are known.
_INLINE_WORDWISE_CHARACTERS = 1 << 14
# Words whose pieces the tokenizer remembers, in each thread that encodes. Its own 10,000 are fewer than a language has,
# and when they are full it learns no more: 200 words of a 21,500-word vocabulary took 0.66 ms, with this 0.42 ms.
_CACHED_WORDS = 1 << 16
# tokenizer_config.json says "no limit" as 1e30.
_LARGEST_LENGTH = 1 << 31
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TextModel:
    """Text to token ids and back for one model. Safe to share between requests.

    Attributes:
        chat_template: None for a model without one.
        eos_token_ids: every id that ends an answer.
        special_token_ids: ids that never appear in the text.
        vocab_size: ids are below this.
        max_length: the longest sequence the model's own files allow in tokens, None where they don't say.
        sampling_defaults: fields of SamplingParams that the model's authors recommend where a request is silent.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
        max_length: int | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
    ) -> None:
        # A tokenizer.json saved after training may cut or pad; a prompt must be neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, BPE):
            tokenizer.model._resize_cache(_CACHED_WORDS)
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = vocab_size or tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_length = max_length
        self.sampling_defaults = dict(sampling_defaults or {})
        description = json.loads(tokenizer.to_str())
        self._byte_rule = byte_rule(description["decoder"])
        self._words = WordTokens(self._encode_plain) if is_wordwise(description) else None
        self._around = self._specials_around() if self._words is not None else ((), ())
        self._inline_characters = _INLINE_CHARACTERS if self._words is None else _INLINE_WORDWISE_CHARACTERS
        self._text_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> TextModel:
        """Read a Hugging Face model folder; takes up to a second, so call it off the event loop.

        Raises:
            StartupError: a file is missing or broken.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StartupError(
                f"{folder} has no tokenizer.json; save one with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{path} cannot be read: {error}") from error
        model, own, generation = (
            _read_json(folder / name) for name in ("config.json", "tokenizer_config.json", "generation_config.json")
        )
        specials = _special_tokens(_read_json(folder / "special_tokens_map.json") | own)
        _mark_special(tokenizer, specials)
        source = read_template(folder, own)
        text_config = model.get("text_config") or model
        return cls(
            tokenizer,
            chat_template=ChatTemplate(source, specials) if source is not None else None,
            eos_token_ids=_eos_ids(tokenizer, specials, generation, text_config),
            vocab_size=text_config.get("vocab_size"),
            max_length=_max_length(own, text_config),
            sampling_defaults=_sampling_defaults(generation),
        )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; long texts are encoded in a thread (the library lets go of the GIL)."""
        if len(text) <= self._inline_characters:
            return self.encode_now(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_now, text, add_special_tokens=add_special_tokens)

    def encode_now(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, here and now."""
        if self._words is not None:
            before, after = self._around if add_special_tokens else ((), ())
            return [*before, *self._words.encode(text), *after]
        # The batch call alone can leave out the characters' offsets, a third of the time.
        only = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return list(only.ids)

    def _encode_plain(self, text: str) -> Sequence[int]:
        only: Sequence[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return only

    def _specials_around(self) -> tuple[Sequence[int], Sequence[int]]:
        """What is put before and after a text, the same for each."""
        alone = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        before = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
        return whole[:before], whole[before + len(alone) :]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of whole sequences, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder, for one answer."""
        if self._byte_rule is None:
            return WindowDetokenizer(self.decode)
        return ByteDetokenizer(self._text_bytes_of, strip_first_space=self._byte_rule.strip_first_space)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, special tokens spelled out; empty for ids beyond the vocabulary."""
        spelled = self._tokenizer.id_to_token(token_id)
        if spelled is None:
            return b""
        if token_id in self.special_token_ids:
            return spelled.encode()
        if self._byte_rule is None:
            return self.decode([token_id]).encode()
        return self._byte_rule.to_bytes(spelled)

    def _text_bytes_of(self, token_id: int) -> bytes:
        found = self._text_bytes.get(token_id)
        if found is None:
            found = b"" if token_id in self.special_token_ids else self.token_bytes(token_id)
            self._text_bytes[token_id] = found
        return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StartupError(f"{path} is not a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like by name; a value is the text itself or an object with its `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _mark_special(tokenizer: Tokenizer, specials: Mapping[str, str]) -> None:
    """Named special tokens are special even where tokenizer.json does not say so, as in transformers.

    Which of them are put around a text is tokenizer.json's to say alone: with that file present transformers
    ignores `add_bos_token` and `add_eos_token`.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    unmarked = [text for text in specials.values() if text not in known]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in unmarked])


def _eos_ids(
    tokenizer: Tokenizer, specials: Mapping[str, str], generation: Mapping[str, Any], model: Mapping[str, Any]
) -> frozenset[int]:
    # config.json is what generation_config.json replaced; it counts only where that is silent.
    declared = generation.get("eos_token_id", model.get("eos_token_id"))
    ids = declared if isinstance(declared, list) else [declared]
    own = tokenizer.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return frozenset(token_id for token_id in (*ids, own) if isinstance(token_id, int))


def _sampling_defaults(generation: Mapping[str, Any]) -> Mapping[str, float]:
    """What the model's authors recommend where a request says nothing, as vLLM's own server applies it."""
    found = {name: generation.get(name) for name in _SAMPLING_DEFAULTS}
    return {name: value for name, value in found.items() if isinstance(value, int | float) and value is not True}


def _max_length(tokenizer_config: Mapping[str, Any], model: Mapping[str, Any]) -> int | None:
    declared = model.get("max_position_embeddings") or tokenizer_config.get("model_max_length")
    return int(declared) if isinstance(declared, int | float) and 0 < declared < _LARGEST_LENGTH else None
