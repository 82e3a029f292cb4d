"""What names a handoff, and what binds bytes to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff import Handoff, Seal, check, digest_tokens
from slipstream.errors import TransferError

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)
IDS = st.binary(min_size=16, max_size=16)
TOKEN = bytes(32)
KEYS = st.binary(min_size=32, max_size=32)
EPOCHS = st.integers(0, 2**64 - 1)
PLACES = st.integers(0, 1 << 20)
BYTES = st.binary(max_size=300)
SEALED = st.tuples(IDS, EPOCHS, KEYS, PLACES, PLACES, BYTES)


def sealed(handoff: bytes, epoch: int, token: bytes, block: int, region: int, data: bytes) -> int:
    return Seal(handoff, epoch, token).digest(memoryview(data), block, region)


@given(TOKENS, TOKENS)
def test_digests_are_equal_for_equal_prompts_only(a: list[int], b: list[int]) -> None:
    assert (digest_tokens(a) == digest_tokens(b)) == (a == b)


@given(SEALED, SEALED)
def test_a_digest_belongs_to_one_piece_of_one_handoff(
    a: tuple[bytes, int, bytes, int, int, bytes], b: tuple[bytes, int, bytes, int, int, bytes]
) -> None:
    assert (sealed(*a) == sealed(*b)) == (a == b)


@given(SEALED, st.integers(0, 5), st.data())
def test_one_difference_is_enough(
    piece: tuple[bytes, int, bytes, int, int, bytes], which: int, data: st.DataObject
) -> None:
    other = list(piece)
    other[which] = data.draw(
        (IDS, EPOCHS, KEYS, PLACES, PLACES, BYTES)[which].filter(lambda value: value != piece[which])
    )
    assert sealed(*piece) != sealed(*other)  # type: ignore[arg-type]


def test_neighbours_in_a_prompt_have_different_digests() -> None:
    digests = {sealed(bytes(16), 1, TOKEN, block, region, b"the same") for block in range(200) for region in range(200)}
    assert len(digests) == 200 * 200


def test_a_handoff_that_is_well_formed_is_itself() -> None:
    for address in ("127.0.0.1:5000", "[::1]:5000", "worker-0.workers:5000"):
        handoff = Handoff(bytes(16), address, 2**64 - 1, bytes(32), TOKEN)
        assert check(handoff) is handoff
        assert "0" * 33 not in repr(handoff)  # the token is in no log


@pytest.mark.parametrize(
    ("handoff", "code"),
    [
        (Handoff(b"", "host:1", 1, bytes(32), TOKEN), "bad_handoff"),
        (Handoff(bytes(17), "host:1", 1, bytes(32), TOKEN), "bad_handoff"),
        (Handoff(bytes(16), "host", 1, bytes(32), TOKEN), "bad_handoff"),
        (Handoff(bytes(16), "host:1", 2**64, bytes(32), TOKEN), "bad_handoff"),
        (Handoff(bytes(16), "host:1", -1, bytes(32), TOKEN), "bad_handoff"),
        (Handoff(bytes(16), "host:1", 1, b"", TOKEN), "bad_token"),
        (Handoff(bytes(16), "host:1", 1, bytes(32), b""), "bad_token"),
    ],
)
def test_a_handoff_that_is_not_is_refused(handoff: Handoff, code: str) -> None:
    with pytest.raises(TransferError) as caught:
        check(handoff)
    assert caught.value.code == code
