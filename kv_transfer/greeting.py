"""How two transfer agents find out that they are who they should be, before anything else is said.

    dialer   -> listener   Knock    its public key, and a fresh share
    listener -> dialer     Answer   its public key, its share, its signature; or Refused
    dialer   -> listener   Proof    its signature

Both sign all that was said so far, with a word for their part, so that neither signature can be used again: not in the
other direction, not on another connection, not after a restart (the keys are new then). From the two shares (X25519)
both make the session's keys, which nobody between them can; each message of the connection carries a tag made with
them and its number, so that one that is forged, replayed, left out or out of order ends the connection. It is the
exchange that is known as SIGMA, of which SSH and TLS 1.3 are the best known relatives.

Plain data in, plain data out: sockets and deadlines are the door's (`kv_transfer.door`).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from kv_transfer.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, has_signed
from slipstream.errors import TransferError

VERSION = 2
MAX_GREETING_BYTES = 512
TAG_BYTES = 16
_LISTENER, _DIALER = b"slipstream kv listener", b"slipstream kv dialer"


class Knock(msgspec.Struct, tag="knock", frozen=True):
    version: int
    key: bytes
    share: bytes


class Answer(msgspec.Struct, tag="answer", frozen=True):
    key: bytes
    share: bytes
    signature: bytes


class Proof(msgspec.Struct, tag="proof", frozen=True):
    signature: bytes


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Why the listener goes no further. Nobody vouches for it: it is a hint, and the end of the connection."""

    code: str
    message: str


Greeting = Knock | Answer | Proof | Refused

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)


def encode(greeting: Greeting) -> bytes:
    return _encoder.encode(greeting)


def decode(body: bytes) -> Greeting:
    """Raises TransferError, `bad_message`: it is none."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"an unreadable greeting: {error}", code="bad_message") from error


class Sealer:
    """Tags the messages of one direction of a session, in their order; made once on either side."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=TAG_BYTES)
        self._number = 0

    def _tag(self, body: bytes) -> bytes:
        tag = self._keyed.copy()
        tag.update(self._number.to_bytes(8, "big"))
        tag.update(body)
        self._number += 1
        return tag.digest()

    def seal(self, body: bytes) -> bytes:
        """The message as it travels."""
        return self._tag(body) + body

    def open(self, sealed: bytes) -> bytes:
        """The message, if it is the other side's next one.

        Raises:
            TransferError: `bad_message`.
        """
        tag, body = sealed[:TAG_BYTES], sealed[TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(body)):
            raise TransferError("a message that the other worker did not send here and now", code="bad_message")
        return body


@dataclass(frozen=True, slots=True)
class Session:
    """What a greeting ends in.

    Attributes:
        id: of this connection, equal on both sides and never seen before. peer: the other side's public key.
    """

    id: bytes
    peer: bytes
    sends: Sealer
    receives: Sealer


class Dialer:
    """The side that opens the connection; `expected` is the key of the worker that it means to reach."""

    def __init__(self, identity: Identity, expected: bytes) -> None:
        self._identity = identity
        self._expected = expected
        self._share = X25519PrivateKey.generate()
        self.knock = Knock(VERSION, identity.public, self._share.public_key().public_bytes_raw())

    def take_answer(self, answer: Greeting) -> tuple[Proof, Session]:
        """Raises TransferError: the listener is not the worker that is meant, or refuses."""
        if isinstance(answer, Refused):
            code = answer.code if answer.code in ("not_registered", "bad_identity") else "worker_gone"
            raise TransferError(f"the other worker refuses: {answer.message[:200]!r}", code=code)
        if not isinstance(answer, Answer):
            raise TransferError("no answer to a knock", code="bad_message")
        if answer.key != self._expected:
            raise TransferError(
                "the worker there was restarted, or is another one than the one that is meant", code="worker_gone"
            )
        text = _transcript(self.knock, answer.key, answer.share)
        if len(answer.signature) != SIGNATURE_BYTES or not has_signed(answer.key, answer.signature, _LISTENER + text):
            raise TransferError("the other worker cannot prove who it is", code="bad_identity")
        to_listener, to_dialer, session_id = _keys(self._share, answer.share, text)
        session = Session(session_id, answer.key, Sealer(to_listener), Sealer(to_dialer))
        return Proof(self._identity.sign(_DIALER + text)), session


class Listener:
    """The side that is called. `knock` tells whose key is claimed: the caller looks whether that one is welcome."""

    def __init__(self, identity: Identity, knock: Greeting) -> None:
        if not isinstance(knock, Knock) or len(knock.key) != KEY_BYTES or len(knock.share) != KEY_BYTES:
            raise TransferError("no knock", code="bad_message")
        if knock.version != VERSION:
            raise TransferError(
                f"the other worker speaks version {knock.version}, this one {VERSION}: run one version on all",
                code="bad_message",
            )
        self.claimed = knock.key
        self._knock = knock
        self._identity = identity
        self._share = X25519PrivateKey.generate()
        self._text = b""

    def answer(self) -> Answer:
        share = self._share.public_key().public_bytes_raw()
        self._text = _transcript(self._knock, self._identity.public, share)
        return Answer(self._identity.public, share, self._identity.sign(_LISTENER + self._text))

    def take_proof(self, proof: Greeting) -> Session:
        """Raises TransferError, `bad_identity`: the dialer is not who it says."""
        assert self._text, "answer() comes first"
        if not isinstance(proof, Proof) or not has_signed(self.claimed, proof.signature, _DIALER + self._text):
            raise TransferError("the dialer cannot prove who it is", code="bad_identity")
        to_listener, to_dialer, session_id = _keys(self._share, self._knock.share, self._text)
        return Session(session_id, self.claimed, Sealer(to_dialer), Sealer(to_listener))


def _transcript(knock: Knock, key: bytes, share: bytes) -> bytes:
    """A digest of both sides' parts; each has its fixed length, so that none can be taken for another."""
    parts = (knock.version.to_bytes(4, "big"), knock.key, knock.share, key, share)
    return hashlib.sha256(b"".join(parts)).digest()


def _keys(own: X25519PrivateKey, share: bytes, text: bytes) -> tuple[bytes, bytes, bytes]:
    """Keys of the two directions, and the session's id.

    Raises:
        TransferError: `bad_identity`: a share from which no secret can be made.
    """
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(share))
    except ValueError as error:
        raise TransferError("a share that is none", code="bad_identity") from error
    return _derived(shared, text, b"to listener"), _derived(shared, text, b"to dialer"), _derived(shared, text, b"id")


def _derived(shared: bytes, text: bytes, what: bytes) -> bytes:
    return hmac.digest(shared, b"slipstream kv " + what + text, "sha256")
