"""The default policy against the plainest thing that decides the same: every pair, one worker after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from frontend.depths import Depths
from frontend.router import Ask, Fleet, Router
from frontend.router.by_time import MARGIN_SHARE
from frontend.router.pairs import BEST
from slipstream.performance import DecodePoint, Profile
from slipstream.v1.registry_pb2 import Load, TransferEndpoint, TransferPath, WorkerState
from tests.unit.frontend.router.plain import Choice, Plain
from tests.unit.frontend.router.workers import DECODE, PREFILL, PROFILE, fast_worker

SLOWER = msgspec.structs.replace(PROFILE, name="slower", step_tokens=512, decode=tuple(
    DecodePoint(point.batch, point.context_tokens, 2.0 * point.seconds) for point in PROFILE.decode
))  # fmt: skip
NOISY = msgspec.structs.replace(PROFILE, name="noisy", decode=tuple(
    DecodePoint(batch, context, seconds)
    for batch, context, seconds in ((1, 1, 0.04), (1, 9000, 0.03), (4, 1, 0.02), (4, 9000, 0.05))
))  # fmt: skip
TRANSPORTS = st.sampled_from([["shm"], ["shm", "ucx"], ["nixl", "ucx"], []])


@dataclass(frozen=True, slots=True)
class Life:
    """What has happened to a worker: requests of this frontend, some further than others, and others' by its feed."""

    fields: dict[str, Any]
    profile: Profile | None
    sent: list[tuple[int, int, float, bool]]
    foreign: tuple[int, int, int]
    fresh: bool
    known: int


def lives(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Life]:
    return st.builds(
        Life,
        st.fixed_dictionaries(fields),
        st.sampled_from([PROFILE, PROFILE, SLOWER, NOISY, None]),
        st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 9000), st.floats(0.0, 5.0), st.booleans()), max_size=4),
        st.tuples(st.integers(0, 5), st.integers(0, 9000), st.integers(0, 9000)),
        st.booleans(),
        st.integers(0, 5000),
    )


ANY = lives(
    host_id=st.sampled_from(["a", "b", "c", ""]),
    state=st.sampled_from([WorkerState.READY] * 4 + [WorkerState.DRAINING]),
    max_model_len=st.sampled_from([100_000, 4000]),
    max_running=st.sampled_from([64, 3]),
    blocks=st.sampled_from([20_000, 600]),
    transfer=TRANSPORTS.map(lambda names: TransferEndpoint(address="h:1", epoch=7, transports=names)),
    paths=st.lists(st.builds(
        TransferPath,
        peer_worker_id=st.sampled_from(["p0", "p1", "p2"]),
        peer_epoch=st.just(7),
        transport=st.just("shm"),
        bytes_per_s=st.sampled_from([1e7, 1e9]),
        latency_s=st.sampled_from([1e-4, 0.1]),
        error=st.sampled_from(["", "", "broken"]),
    ), max_size=2),
)  # fmt: skip
ROOMY = lives(
    host_id=st.sampled_from(["a", "b", "c", "d", "e"]),
    blocks=st.just(1_000_000),
    max_running=st.just(1000),
    transfer=st.just(TransferEndpoint(address="h:1", epoch=7, transports=["shm", "ucx"])),
)


def fleet_of(prefills: list[Life], decodes: list[Life]) -> tuple[Fleet, dict[str, int]]:
    """The fleet, and what each worker has of the prompt."""
    fleet, known = Fleet(tie_break="one"), dict[str, int]()
    named = [(f"p{number}", PREFILL, life) for number, life in enumerate(prefills)]
    named += [(f"d{number}", DECODE, life) for number, life in enumerate(decodes)]
    for name, role, life in named:
        fleet.put(fast_worker(name, role, **life.fields).record)
        fleet.note_profile(name, life.profile)
        if life.known > 1000:  # a few different depths, and often nothing
            known[name] = life.known // 1500 * 1500
    for name, role, life in named:
        for prompt, new, at_s, through in sorted(life.sent, key=lambda one: one[2]):
            share = fleet.begin(name, prompt, min(prompt, new) if role == PREFILL else 0, at_s)
            if through and share is not None:
                share.prompt_done(at_s)
        running, waiting_tokens, context_tokens = life.foreign
        if not life.fresh:
            own = Load(running=len(life.sent), context_tokens=10)
            load = Load(running=len(life.sent) + running, context_tokens=10 + context_tokens)
            load.waiting_tokens = waiting_tokens
            fleet.note_load(name, load, own, 5.0)
            fleet.begin(name, 100, 0, 5.0)
    return fleet, known


ASKS = st.builds(
    Ask,
    st.just("m"),
    st.integers(1, 9000),
    st.sampled_from([0, 50, 3000]),
    excluded=st.sets(st.sampled_from(["p0", "d0", "d1"]), max_size=1),
    suspects=st.sets(st.sampled_from(["p1", "d2"]), max_size=1),
    expected_tokens=st.sampled_from([0.0, 300.0]),
)


def decided(ask: Ask, fleet: Fleet, *, always: bool) -> Choice:
    """What the router chose, with the cost that the plain way finds for it."""
    route = Router(always_hand_off=always).choose(ask, fleet, 6.0)
    plain = Plain(ask, fleet, 6.0)
    chosen = (route.prefill.worker_id if route.prefill is not None else "", route.decode.worker_id)
    found = next(one for one in (*plain.pairs(), *plain.alone()) if (one.prefill, one.decode) == chosen)
    if route.predicted is not None and route.prefill is not None:
        assert route.predicted.ready_s == pytest.approx(found.ready_s), "what is shown is what was compared"
    return found


def by_slot(ask: Ask, fleet: Fleet) -> Ask:
    places = fleet.places()
    return replace(ask, known={}, known_by_slot=Depths.of({places[n]: v for n, v in ask.known.items()}, fleet.slots))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(ANY, max_size=2 * BEST), st.lists(ANY, min_size=1, max_size=2 * BEST), ASKS, st.booleans(), st.booleans()
)
def test_it_is_the_best_of_all_pairs_and_of_all_that_decode_alone(
    prefills: list[Life], decodes: list[Life], asked: Ask, always: bool, indexed: bool
) -> None:
    fleet, known = fleet_of(prefills, decodes)
    ask = replace(asked, known=known)
    plain = Plain(ask, fleet, 6.0)
    assume(plain.usable(DECODE, 0))
    best = plain.best(always_hand_off=always)
    route = Router(always_hand_off=always).choose(by_slot(ask, fleet) if indexed else ask, fleet, 6.0)
    chosen = decided(ask, fleet, always=always)
    assert (route.prefill.worker_id if route.prefill else "", route.decode.worker_id) == (chosen.prefill, chosen.decode)
    if bool(chosen.prefill) == bool(best.prefill):
        assert chosen.ordered_s == pytest.approx(best.ordered_s, rel=1e-9)
    else:  # both are as good, to the last bit of what decides between them
        pair = min(plain.pairs(), key=lambda one: one.ordered_s)
        alone = min(plain.alone(), key=lambda one: one.ordered_s)
        assert pair.ordered_s - alone.ordered_s == pytest.approx(MARGIN_SHARE * pair.ready_s, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.lists(ROOMY, min_size=7, max_size=20), st.lists(ROOMY, min_size=7, max_size=20), ASKS)
def test_among_many_it_is_never_worse_than_the_best_by_more_than_the_best_twos_transfer(
    prefills: list[Life], decodes: list[Life], asked: Ask
) -> None:
    fleet, known = fleet_of(prefills, decodes)
    ask = replace(asked, prompt_tokens=max(2, asked.prompt_tokens), known=known)
    plain = Plain(ask, fleet, 6.0)
    pairs = sorted(plain.pairs(), key=lambda one: one.ordered_s)
    chosen = decided(ask, fleet, always=True)
    # The best of each side, of which the sum is a bound for every pair's cost, are looked at in any case.
    sums = {(one.prefill, one.decode): one.ordered_s for one in pairs}
    assert chosen.ordered_s >= pairs[0].ordered_s - 1e-9
    assert (chosen.prefill, chosen.decode) in sums
    assert chosen.ordered_s - pairs[0].ordered_s <= transfer_of_the_best_two(plain) + 1e-9


def transfer_of_the_best_two(plain: Plain) -> float:
    echo, more = plain.echo(PREFILL), 1.0 + plain.behind()
    prefill = min(
        plain.usable(PREFILL, plain.ask.prompt_tokens),
        key=lambda one: plain.ordered_s(one, plain.queue_s(one, echo) + plain.alone_s(one) * more),
    )
    decode = min(plain.usable(DECODE, plain.ask.prompt_tokens + plain.ask.max_tokens), key=plain.decode_s)
    pair = next(one for one in plain.pairs() if (one.prefill, one.decode) == (prefill.worker_id, decode.worker_id))
    return pair.ready_s - plain.queue_s(prefill, echo) - plain.alone_s(prefill)
