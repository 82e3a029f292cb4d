"""Two agents that do not know each other: what each can prove, and what nobody between them can do."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import greeting, permits
from kv_transfer.greeting import Dialer, Listener, Proof, Session
from kv_transfer.identity import Identity
from slipstream.errors import TransferError

DECODE, PREFILL, STRANGER = Identity(), Identity(), Identity()


def greeted() -> tuple[Session, Session]:
    """Of the dialer, and of the listener."""
    dialer = Dialer(DECODE, PREFILL.public)
    listener = Listener(PREFILL, dialer.knock)
    proof, ours = dialer.take_answer(listener.answer())
    return ours, listener.take_proof(proof)


def test_two_that_know_each_other_have_a_session_of_their_own() -> None:
    (ours, theirs), (other, _) = greeted(), greeted()
    assert (ours.peer, theirs.peer) == (PREFILL.public, DECODE.public)
    assert ours.id == theirs.id != other.id
    for message in (b"", b"one", b"one", b"x" * 1000):
        assert theirs.receives.open(ours.sends.seal(message)) == message
        assert ours.receives.open(theirs.sends.seal(message)) == message


def test_who_has_another_key_is_not_taken_for_the_worker_that_is_meant() -> None:
    dialer = Dialer(DECODE, PREFILL.public)
    with pytest.raises(TransferError) as caught:
        dialer.take_answer(Listener(STRANGER, dialer.knock).answer())
    assert caught.value.code == "worker_gone"  # as a worker that was started again


def test_who_claims_another_ones_key_cannot_prove_it() -> None:
    claiming = Dialer(STRANGER, PREFILL.public)
    listener = Listener(PREFILL, greeting.Knock(greeting.VERSION, DECODE.public, claiming.knock.share))
    listener.answer()
    with pytest.raises(TransferError) as caught:
        listener.take_proof(Proof(STRANGER.sign(b"slipstream kv dialer")))
    assert caught.value.code == "bad_identity"


def test_a_listener_that_claims_another_ones_key_cannot_prove_it() -> None:
    dialer = Dialer(DECODE, PREFILL.public)
    said = Listener(STRANGER, dialer.knock).answer()
    with pytest.raises(TransferError) as caught:
        dialer.take_answer(greeting.Answer(PREFILL.public, said.share, said.signature))
    assert caught.value.code == "bad_identity"


def test_a_proof_that_was_overheard_proves_nothing_on_another_connection() -> None:
    dialer = Dialer(DECODE, PREFILL.public)
    proof, _ = dialer.take_answer(Listener(PREFILL, dialer.knock).answer())
    again = Listener(PREFILL, dialer.knock)  # the knock is replayed too
    again.answer()
    with pytest.raises(TransferError) as caught:
        again.take_proof(proof)
    assert caught.value.code == "bad_identity"


def test_somebody_in_between_who_puts_in_a_share_of_his_own_is_noticed_by_both() -> None:
    dialer, between = Dialer(DECODE, PREFILL.public), Dialer(STRANGER, PREFILL.public)
    listener = Listener(PREFILL, greeting.Knock(greeting.VERSION, DECODE.public, between.knock.share))
    answer = listener.answer()
    with pytest.raises(TransferError) as caught:
        dialer.take_answer(answer)
    assert caught.value.code == "bad_identity"


def test_a_share_from_which_no_secret_can_be_made_is_refused() -> None:
    dialer = Dialer(DECODE, PREFILL.public)
    listener = Listener(PREFILL, greeting.Knock(greeting.VERSION, DECODE.public, bytes(32)))
    answer = listener.answer()
    with pytest.raises(TransferError):
        listener.take_proof(Proof(bytes(64)))
    with pytest.raises(TransferError):
        dialer.take_answer(greeting.Answer(answer.key, bytes(32), answer.signature))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda said: said[:-1] + bytes([said[-1] ^ 1]),
        lambda said: bytes([said[0] ^ 1]) + said[1:],
        lambda said: said[:3],
        lambda said: b"",
    ],
    ids=["its text", "its tag", "cut off", "nothing"],
)
def test_a_message_that_was_changed_is_refused(spoil: object) -> None:
    ours, theirs = greeted()
    assert callable(spoil)
    with pytest.raises(TransferError) as caught:
        theirs.receives.open(spoil(ours.sends.seal(b"a message")))
    assert caught.value.code == "bad_message"


def test_messages_that_are_replayed_left_out_reordered_or_turned_back_are_refused() -> None:
    for *before, last in ([0, 0], [1], [0, 2], [0, 1, 0]):
        ours, theirs = greeted()
        said = [ours.sends.seal(f"message {number}".encode()) for number in range(3)]
        for number in before:
            theirs.receives.open(said[number])
        with pytest.raises(TransferError):
            theirs.receives.open(said[last])
    ours, _ = greeted()
    with pytest.raises(TransferError):
        ours.receives.open(ours.sends.seal(b"an echo"))


@given(st.binary(max_size=greeting.MAX_GREETING_BYTES))
def test_a_greeting_that_is_none_is_refused_with_a_type(said: bytes) -> None:
    with contextlib.suppress(TransferError):
        Listener(PREFILL, greeting.decode(said))
    dialer = Dialer(DECODE, PREFILL.public)
    with contextlib.suppress(TransferError):
        dialer.take_answer(greeting.decode(said))


KEYS = st.binary(min_size=32, max_size=32)
IDS = st.binary(min_size=16, max_size=16)
SHOWN = st.tuples(KEYS, KEYS, IDS, st.integers(0, 2**31 - 1), st.integers(0, 2**64 - 1))


@given(SHOWN, SHOWN)
def test_what_is_shown_of_a_token_fits_one_handoff_on_one_connection(
    one: tuple[bytes, bytes, bytes, int, int], other: tuple[bytes, bytes, bytes, int, int]
) -> None:
    assert (permits.begins(*one) == permits.begins(*other)) == (one == other)
    assert (permits.opens(*one[:3]) == permits.opens(*other[:3])) == (one[:3] == other[:3])
    assert permits.opens(*one[:3]) != permits.begins(*one)
