"""What is not exactly the prompt's bytes is never accepted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from kv_transfer import exchange
from kv_transfer.kv_memory import address_of
from kv_transfer.transports.base import LandingLink, ReadLink, Run, Transport, Way
from tests.support.kv_node import REGIONS, KvNode, flip, new_handoff
from tests.support.kv_peer import KvPeer

IDS = [9, 3, 4, 5, 30, 0]
TARGETS = [7, 20, 21, 22, 1, 40]


class Faulty:
    """A transport whose links change a byte of what comes in, the first `times` times."""

    def __init__(self, inner: Transport, times: int) -> None:
        self._inner = inner
        self.left = times
        self.name = inner.name
        self.open, self.card, self.close = inner.open, inner.card, inner.close

    async def connect(self, card: bytes) -> ReadLink | LandingLink:
        link = await self._inner.connect(card)
        return FaultyReads(link, self) if isinstance(link, ReadLink) else FaultyLandings(link, self)

    def strike(self, address: int) -> None:
        if self.left > 0:
            self.left -= 1
            flip(address)


class FaultyReads:
    def __init__(self, inner: ReadLink, owner: Faulty) -> None:
        self._inner = inner
        self._owner = owner
        self.way: Way = inner.way
        self.close = inner.close

    def read(self, sources: Sequence[Run], targets: Sequence[Run]) -> None:
        self._inner.read(sources, targets)
        self._owner.strike(targets[-1].address + targets[-1].length - 1)


class FaultyLandings:
    def __init__(self, inner: LandingLink, owner: Faulty) -> None:
        self._inner = inner
        self._owner = owner
        self.way: Way = inner.way
        self.span_bytes = inner.span_bytes
        self.grant, self.send, self.release, self.close = inner.grant, inner.send, inner.release, inner.close

    async def receive(self, ticket: int, length: int) -> memoryview:
        data = await self._inner.receive(ticket, length)
        self._owner.strike(address_of(data) + length // 2)
        return data


def test_a_flipped_byte_is_noticed_and_the_span_sent_again(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    ours = make(wrap=lambda transport: Faulty(transport, 1))
    handoff = new_handoff()
    peer.do("send", handoff, IDS)
    received = ours.fetch(handoff, peer.address, peer.epoch, TARGETS)
    assert (received.error, received.again) == ("", 1)
    assert all(ours.holds(target, f"{peer.epoch}-{block}") for target, block in zip(TARGETS, IDS, strict=True))


@pytest.mark.parametrize("budget", [0, 3])
def test_a_way_that_always_errs_is_given_up_when_the_budget_is_spent(
    peer: KvPeer, make: Callable[..., KvNode], budget: int
) -> None:
    ours = make(wrap=lambda transport: Faulty(transport, 1 << 30), budget=budget)
    handoff = new_handoff()
    peer.do("send", handoff, IDS)
    received = ours.fetch(handoff, peer.address, peer.epoch, TARGETS)
    assert (received.error, received.blocks) == ("digest", 0)
    assert budget < received.again <= budget + 2  # two spans are looked at at the same time
    assert "resend_budget" in received.message
    assert peer.until("Taken", handoff).error == "digest"


def test_as_many_errors_as_the_budget_allows_are_survived(peer: KvPeer, make: Callable[..., KvNode]) -> None:
    ours = make(wrap=lambda transport: Faulty(transport, 3), budget=3)
    handoff = new_handoff()
    peer.do("send", handoff, IDS)
    received = ours.fetch(handoff, peer.address, peer.epoch, TARGETS)
    assert (received.error, received.again) == ("", 3)
    assert ours.holds(TARGETS[5], f"{peer.epoch}-{IDS[5]}")


def test_blocks_with_a_new_use_are_not_taken_for_the_old_one(peer: KvPeer, ours: KvNode) -> None:
    """Announced late: the digests were to be made of blocks that another prompt has by then."""
    handoff = new_handoff()
    blocks = [41, 42, 43]
    peer.all([["send", handoff, blocks], ["reset", handoff], *(["write", block, "another"] for block in blocks)])
    ours.open(handoff, peer.address, peer.epoch)
    ours.until("Started", handoff)
    ours.receive(handoff, [1, 2, 3])
    ours.watch(0.1)
    assert ours.all_of("Received", handoff) == []
    assert not any(ours.holds(target, "another") for target in (1, 2, 3))
    peer.do("end", handoff)
    assert ours.until("Received", handoff).error == "lease_ended"


def a_life(rng: random.Random, handoff: str, preemptions: int) -> tuple[list[list[object]], int]:
    """Commands of a sender that computes a prompt, is preempted now and then, and computes it anew elsewhere.

    Blocks are written right before they are published, and overwritten right after they were taken away.
    """
    count = rng.randint(1, 8)
    commands: list[list[object]] = []
    for attempt in range(preemptions + 1):
        ids = rng.sample(range(48), count)
        commands.append(["begin", handoff])
        first = 0
        left = attempt < preemptions
        while first < count and not (left and rng.random() < 0.2):
            end = rng.randint(first + 1, count)
            commands += [["write", ids[index], f"{handoff}-{index}"] for index in range(first, end)]
            cuts = sorted({0, REGIONS, rng.randint(1, REGIONS)})
            commands += [["publish", handoff, ids[:end], first, end, *cut] for cut in itertools.pairwise(cuts)]
            if rng.random() < 0.5:
                commands.append(["pause", rng.random() * 0.003])
            first = end
        if first == count:
            commands.append(["computed", handoff])
            if rng.random() < 0.5:
                commands.append(["pause", rng.random() * 0.003])
        if left:
            commands.append(["reset", handoff])
            commands += [["write", block, f"other {attempt} {block}"] for block in ids]
    return commands, count


@pytest.mark.parametrize("where", ["in the loop", "in threads"])
def test_whatever_happens_to_the_senders_blocks_what_is_accepted_is_right(
    peer: KvPeer,
    start: Callable[..., KvPeer],
    make: Callable[..., KvNode],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    if where == "in threads":  # as large blocks are
        monkeypatch.setattr(exchange, "_SMALL_BYTES", 0)
        peer = start(small_bytes=0)
    ours = make(budget=1000, span_bytes=2048)
    rng = random.Random(20)
    again = 0
    for _ in range(300):
        handoff = new_handoff()
        commands, count = a_life(rng, handoff, rng.choice([0, 1, 1, 2, 3]))
        targets = rng.sample(range(48), count)
        ours.open(handoff, peer.address, peer.epoch)
        peer.post(commands)
        ours.until("Started", handoff)
        ours.receive(handoff, targets)
        received = ours.until("Received", handoff)
        peer.answers()
        assert received.error == "", received
        for index, target in enumerate(targets):
            assert ours.holds(target, f"{handoff}-{index}"), f"block {index} of {count}"
        again += received.again
        peer.do("end", handoff)
        ours.seen.clear()
    assert again > 0 or where == "in the loop"  # or the rounds were too tame to say anything
