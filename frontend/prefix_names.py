"""Names for the beginnings of a prompt, made of its bytes: how a global frontend and a cluster speak of what is cached.

A global frontend has no tokenizer. It hashes the prompt as the client wrote it (the JSON of `messages` or `prompt`, or
a gRPC input) at fixed places, which lie closer at the beginning, and sends the names along with the request. The
cluster remembers which KV blocks they stood for, and tells which of the names it still has. A name is 32 bits of xxh3:
one that is taken for another costs a worse choice of cluster and nothing else.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64

UNIT_BYTES = 256
PER_OCTAVE = 8
"""Places in each doubling beyond the first sixteen units: a cached beginning is taken for an eighth shorter at most."""

MAX_NAMES = 128
"""More than a prompt of the largest body has."""

_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True)
class PrefixNames:
    """A prompt's.

    Attributes:
        prompt_bytes: of the whole prompt.
        names: of the beginnings that end at `places(prompt_bytes)`, the shortest first.
    """

    prompt_bytes: int
    names: Sequence[int]

    def to_header(self) -> str:
        """What `from_header` reads."""
        return f"{self.prompt_bytes};{encoded(self.names)}"


NOTHING = PrefixNames(0, ())


def places(prompt_bytes: int) -> Iterator[int]:
    """Where named beginnings of a prompt end, in bytes; the same for all prompts that are so long or longer."""
    units, step = 1, 1
    while (place := units * UNIT_BYTES) <= prompt_bytes:
        yield place
        if units >= 2 * PER_OCTAVE * step:
            step *= 2
        units += step


def names_of(model: str, prompt: bytes | memoryview) -> PrefixNames:
    """The names of a prompt's beginnings."""
    state, done, names = xxh3_64(model.encode()), 0, []
    for place in places(len(prompt)):
        state.update(prompt[done:place])
        names.append(state.intdigest() & 0xFFFFFFFF)
        done = place
    return PrefixNames(len(prompt), names[:MAX_NAMES])


def from_header(value: str) -> PrefixNames:
    """What another process wrote; `NOTHING` of what nobody could have written."""
    length, _, content = value.partition(";")
    names = decoded(content)
    if not length.isascii() or not length.isdecimal() or len(length) > 12 or len(names) > MAX_NAMES:
        return NOTHING
    prompt_bytes = int(length)
    return PrefixNames(prompt_bytes, names) if sum(1 for _ in places(prompt_bytes)) >= len(names) else NOTHING


def encoded(names: Sequence[int]) -> str:
    """Names as text."""
    return base64.b64encode(array("I", names).tobytes()).decode()


def decoded(text: str) -> Sequence[int]:
    """The names; none of what is not `encoded`."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return ()
    if len(content) % _ITEM_BYTES:
        return ()
    names = array("I")
    names.frombytes(content)
    return names
