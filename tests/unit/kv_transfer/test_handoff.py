"""What crosses from prefill to decode by way of the frontend."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import handoff as handoffs
from kv_transfer.handoff import Handoff
from slipstream.errors import TransferError

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)


def a_handoff(**changes: object) -> Handoff:
    made = Handoff(handoffs.VERSION, "slipstream-1.board", 7, 3, 8, 200, 99, [4, 5])
    return msgspec.structs.replace(made, **changes)


@given(st.lists(st.integers(0, 2**20)), st.integers(0, 2**63), st.integers(0, 2**63))
def test_a_handoff_survives_the_wire(block_ids: list[int], epoch: int, digest: int) -> None:
    made = a_handoff(block_ids=block_ids, epoch=epoch, digest=digest)
    assert handoffs.decode(handoffs.encode(made)) == made


@given(st.binary(max_size=200))
def test_bytes_that_are_no_handoff_are_refused_with_a_type(raw: bytes) -> None:
    with pytest.raises(TransferError) as caught:
        handoffs.decode(raw)
    assert caught.value.code == "bad_handoff"


def test_another_version_is_refused_and_the_remedy_named() -> None:
    with pytest.raises(TransferError, match="one version on all workers"):
        handoffs.decode(handoffs.encode(a_handoff(version=handoffs.VERSION + 1)))


@given(TOKENS, TOKENS)
def test_digests_are_equal_for_equal_prompts_only(a: list[int], b: list[int]) -> None:
    assert (handoffs.digest_tokens(a) == handoffs.digest_tokens(b)) == (a == b)
