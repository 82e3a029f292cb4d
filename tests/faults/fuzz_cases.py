"""What the fuzzer does in one case, drawn from a seed: some requests, some of them abandoned, and one or two faults.

A case is a function of the seed, its number and the cluster's size alone; the moments at which things happen are the
machine's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

MAX_TOKENS = 48


class Stage(StrEnum):
    """How far a case's requests are when something is done to them."""

    QUEUED = "queued"  # sent this moment
    OPENED = "opened"  # decode waits for the handoff; prefill may not have begun
    STREAMING = "streaming"  # prefill computes, blocks flow
    HELD = "held"  # a prompt is computed and its blocks are pinned for decode
    DECODING = "decoding"  # the first tokens have come


class Kind(StrEnum):
    """What is done."""

    NOTHING = "nothing"  # only load, and what clients abandon
    KILL_SERVICE = "kill_service"
    KILL_ENGINE = "kill_engine"
    STOP_SHORT = "stop_short"  # SIGSTOP of service and engine for less than their lease, then SIGCONT
    STOP_LONG = "stop_long"  # for longer than lease and silence
    STOP_ENGINE = "stop_engine"  # the engine alone, long
    STOP_SERVICE = "stop_service"  # the service alone, long: nobody renews its leases
    DRAIN = "drain"  # SIGTERM, then a new incarnation
    CUT = "cut"  # the control connections of a transfer agent are shut down
    GARBAGE = "garbage"  # nonsense is sent to a transfer agent's port
    FLIP = "flip"  # bits change in the landing area of a receiver
    LOSE_PLANE = "lose_plane"  # the control plane is killed


# How often each is drawn. What needs a restart is dear.
_WEIGHTS = {
    Kind.NOTHING: 8,
    Kind.KILL_SERVICE: 12,
    Kind.KILL_ENGINE: 12,
    Kind.STOP_SHORT: 10,
    Kind.STOP_LONG: 10,
    Kind.STOP_ENGINE: 10,
    Kind.STOP_SERVICE: 10,
    Kind.DRAIN: 5,
    Kind.CUT: 12,
    Kind.GARBAGE: 8,
    Kind.FLIP: 14,
    Kind.LOSE_PLANE: 2,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Attributes:
    member: index of the worker it is done to.
    delay_s: from when the stage is reached.
    hold_s: how long a process is stopped, or bits are flipped.
    """

    kind: Kind
    member: int
    stage: Stage
    delay_s: float
    hold_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    """One request.

    Attributes:
        which: prompt of the pool.
        delay_s: after the case's begin.
        gives_up: at which stage its client goes away, and how long after it began; None: it stays.
    """

    which: int
    max_tokens: int
    delay_s: float
    gives_up: tuple[Stage, float] | None


@dataclass(frozen=True, slots=True)
class Case:
    """See the module's docstring."""

    number: int
    requests: tuple[Planned, ...]
    faults: tuple[Fault, ...]

    @property
    def title(self) -> str:
        done = ", ".join(f"{fault.kind} of member {fault.member} when {fault.stage}" for fault in self.faults)
        return f"case {self.number}: {len(self.requests)} requests, {done}"


def draw(seed: int, number: int, *, prompts: int, members: int, landing: bool) -> Case:
    """Case `number` of a seed.

    Args:
        prompts: size of the pool. members: workers of the cluster, prefill workers first.
        landing: whether blocks come through a landing area, where bits can be flipped.
    """
    rng = random.Random(f"{seed}:{number}")
    requests = tuple(_request(rng, prompts) for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 12))))
    kinds = [kind for kind in _WEIGHTS if landing or kind is not Kind.FLIP]
    weights = [_WEIGHTS[kind] for kind in kinds]
    count = 2 if rng.random() < 0.2 else 1
    faults = tuple(_fault(rng, kind, members) for kind in rng.choices(kinds, weights, k=count))
    return Case(number, requests, faults)


def _request(rng: random.Random, prompts: int) -> Planned:
    gives_up = None
    if rng.random() < 0.3:
        stage = rng.choice((Stage.QUEUED, Stage.OPENED, Stage.STREAMING, Stage.DECODING))
        after_s = {Stage.QUEUED: 0.002, Stage.OPENED: 0.03, Stage.STREAMING: 0.4, Stage.DECODING: 0.2}[stage]
        gives_up = (stage, rng.uniform(0, after_s))
    delay_s = 0.0 if rng.random() < 0.5 else rng.uniform(0, 0.3)
    return Planned(rng.randrange(prompts), rng.randint(4, MAX_TOKENS), delay_s, gives_up)


def _fault(rng: random.Random, kind: Kind, members: int) -> Fault:
    hold_s = {
        Kind.STOP_SHORT: rng.uniform(0.05, 0.4),
        Kind.STOP_LONG: rng.uniform(1.3, 2.5),
        Kind.STOP_ENGINE: rng.uniform(0.8, 2.5),
        Kind.STOP_SERVICE: rng.uniform(1.3, 2.5),
        Kind.FLIP: rng.uniform(0.05, 0.6),
    }.get(kind, 0.0)
    # Bytes lie in a landing area for a moment only, while they travel.
    stages = (Stage.QUEUED, Stage.OPENED, Stage.STREAMING) if kind is Kind.FLIP else tuple(Stage)
    return Fault(kind, rng.randrange(members), rng.choice(stages), rng.uniform(0, 0.08), hold_s)
