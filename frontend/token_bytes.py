"""What bytes a token stands for, read off the tokenizer's own decoder description.

Nearly every model of today writes text in one of two ways: byte-level BPE (GPT, Llama 3, Qwen, SmolLM) or
sentencepiece with byte fallback (Llama 2, Mistral, Gemma). In both a token is a fixed run of bytes, so that
streaming text is nothing but an incremental UTF-8 decoder: exact, and without a call into the tokenizer for
each token. Whatever is neither gets None here and is decoded through windows (`frontend.detokenizer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN_LENGTH = len("<0x00>")


@dataclass(frozen=True, slots=True)
class ByteRule:
    """How tokens become bytes.

    Attributes:
        to_bytes: from a token as the vocabulary spells it.
        strip_first_space: the text as a whole loses one leading space (sentencepiece's dummy prefix).
    """

    to_bytes: Callable[[str], bytes]
    strip_first_space: bool = False


def byte_rule(decoder: Mapping[str, Any] | None) -> ByteRule | None:
    """The rule behind the `decoder` section of a tokenizer.json, or None when it is not a matter of bytes."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    match [step["type"] for step in steps]:
        case ["ByteLevel"]:
            return ByteRule(_byte_level())
        case ["Replace", "ByteFallback", "Fuse"] if _is_metaspace(steps[0]):
            return ByteRule(_sentencepiece)
        case ["Replace", "ByteFallback", "Fuse", "Strip"] if _is_metaspace(steps[0]) and _strips_one_space(steps[3]):
            return ByteRule(_sentencepiece, strip_first_space=True)
        case _:
            return None


def _byte_level() -> Callable[[str], bytes]:
    table = _byte_of_character()

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([table[character] for character in token])
        except KeyError:  # an added token, spelled as it reads
            return token.encode()

    return to_bytes


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}


def _sentencepiece(token: str) -> bytes:
    if len(token) == _BYTE_TOKEN_LENGTH and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _is_metaspace(step: Mapping[str, Any]) -> bool:
    return bool(step["pattern"] == {"String": "▁"} and step["content"] == " ")


def _strips_one_space(step: Mapping[str, Any]) -> bool:
    return bool(step["content"] == " " and step["start"] == 1 and step["stop"] == 0)
