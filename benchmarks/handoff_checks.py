"""What it costs that KV blocks move between registered workers alone: `python -m benchmarks.handoff_checks [--json]`.

CPU microseconds of both sides together, in one process, without sockets: of a greeting, once a connection (two key
exchanges, two signatures made and two checked); of a handoff's token, once a handoff (both sides show theirs and check
the other's, and the key for its digests is made); of the tag of each control message. CPU seconds and not time, the
best of some rounds, so that what else the machine does matters little.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from kv_transfer import permits, wire
from kv_transfer.greeting import Dialer, Listener, Session, decode, encode
from kv_transfer.identity import Identity

_ROUNDS = 9
_GREETINGS, _HANDOFFS, _MESSAGES = 200, 5000, 20_000
_PROMPT_TOKENS = 4096

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU microseconds, sender and receiver together: the best round, and the median one."""

    what: str
    best_us: float
    median_us: float


@app.command()
def handoff_checks(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what greetings, handoff tokens and tags cost."""
    decode_side, prefill_side = Identity(), Identity()
    dialer, listener = _greeted(decode_side, prefill_side)
    message = wire.encode(wire.Started(os.urandom(16), _PROMPT_TOKENS, 1, os.urandom(32)))
    costs = [
        _cost("greeting, a connection", _GREETINGS, lambda: _greeted(decode_side, prefill_side)),
        _cost("token, a handoff", _HANDOFFS, lambda: _checked(dialer, listener)),
        _cost(f"tag, a message of {len(message)} bytes", _MESSAGES, lambda: _tagged(dialer, listener, message)),
    ]
    if as_json:
        print(json.dumps([asdict(one) for one in costs], indent=2))  # noqa: T201
        return
    for one in costs:
        print(f"{one.what:30} best {one.best_us:7.1f} us, median {one.median_us:7.1f} us")  # noqa: T201


def _greeted(decode_side: Identity, prefill_side: Identity) -> tuple[Session, Session]:
    """As a receiver's and a sender's agent greet each other, with what each reads and writes."""
    dialer = Dialer(decode_side, prefill_side.public)
    listener = Listener(prefill_side, decode(encode(dialer.knock)))
    proof, ours = dialer.take_answer(decode(encode(listener.answer())))
    return ours, listener.take_proof(decode(encode(proof)))


def _checked(receiver: Session, sender: Session) -> None:
    """What is done for one handoff because there are tokens."""
    token, handoff = os.urandom(permits.TOKEN_BYTES), os.urandom(16)
    shown = permits.opens(token, receiver.id, handoff)
    permits.check(shown, permits.opens(token, sender.id, handoff), "the receiver")
    shown = permits.begins(token, sender.id, handoff, _PROMPT_TOKENS, 1)
    permits.check(shown, permits.begins(token, receiver.id, handoff, _PROMPT_TOKENS, 1), "the sender")
    for _ in (sender, receiver):
        permits.seal_key(token, handoff, 1)


def _tagged(receiver: Session, sender: Session, message: bytes) -> None:
    receiver.receives.open(sender.sends.seal(message))


def _cost(what: str, count: int, act: Callable[[], object]) -> Cost:
    rounds = []
    for _ in range(_ROUNDS):
        began_s = time.process_time()
        for _ in range(count):
            act()
        rounds.append((time.process_time() - began_s) / count * 1e6)
    rounds.sort()
    return Cost(what, round(rounds[0], 2), round(rounds[len(rounds) // 2], 2))


if __name__ == "__main__":
    app()
