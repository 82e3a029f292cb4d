"""What a run does, drawn from its seed: rounds of requests and faults. Plain data and a pure function."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

EngineName = Literal["simulated", "vllm"]

IDS, TEXTS, CONVERSATIONS, TURNS = 64, 24, 10, 3
TENANTS = 3
_QUIET_S = 8.0  # what a quiet point takes about, for the number of rounds


class Form(StrEnum):
    """What a prompt is given as."""

    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"


class Face(StrEnum):
    HTTP = "http"
    GRPC = "grpc"


class Group(StrEnum):
    """Processes that can stand in for one another."""

    PREFILL = "prefill"
    DECODE = "decode"
    FRONTEND = "frontend"
    PLANE = "control-plane"


class Kind(StrEnum):
    """What is done."""

    KILL = "kill"  # SIGKILL of a worker's service, a frontend, the control plane
    KILL_ENGINE = "kill_engine"  # of a worker's engine process, where it has one
    KILL_MEMBER = "kill_member"  # of one process of a frontend's pool
    STOP_SHORT = "stop_short"  # SIGSTOP for less than a lease, then SIGCONT
    STOP_LONG = "stop_long"  # for longer than lease and silence
    DRAIN = "drain"  # SIGTERM, then a new process
    ROLLING = "rolling"  # all workers but the spared ones are drained and started anew, one after another
    FLIP_ROLE = "flip_role"  # a worker gets the other role, and later its own again
    CUT_TRANSFERS = "cut_transfers"  # the connections of a worker's transfer agent end
    CUT_CALLS = "cut_calls"  # the connections to a worker's service end
    CUT_CLIENTS = "cut_clients"  # the connections to a frontend end
    GARBAGE = "garbage"  # nonsense is sent to a transfer agent's port
    FLIP_BITS = "flip_bits"  # bits change in the landing area of a receiver
    BLACKHOLE = "blackhole"  # packets to and from a worker's ports are dropped
    OVERLOAD = "overload"  # many requests at once
    PRESSURE = "pressure"  # long prompts with long answers at once: the KV cache is too small for them
    STAMPEDE = "stampede"  # many requests whose clients all go away


# By group, how often each is drawn in a rough round.
_ROUGH: dict[Kind, tuple[float, tuple[Group, ...]]] = {
    Kind.KILL: (16, (Group.PREFILL, Group.DECODE, Group.DECODE, Group.FRONTEND, Group.PLANE)),
    Kind.KILL_ENGINE: (8, (Group.PREFILL, Group.DECODE)),
    Kind.KILL_MEMBER: (2, (Group.FRONTEND,)),
    Kind.STOP_SHORT: (8, (Group.PREFILL, Group.DECODE, Group.FRONTEND, Group.PLANE)),
    Kind.STOP_LONG: (10, (Group.PREFILL, Group.DECODE, Group.FRONTEND, Group.PLANE)),
    Kind.DRAIN: (8, (Group.PREFILL, Group.DECODE, Group.FRONTEND)),
    Kind.ROLLING: (2, (Group.DECODE,)),
    Kind.FLIP_ROLE: (6, (Group.PREFILL, Group.DECODE)),
    Kind.CUT_TRANSFERS: (7, (Group.PREFILL, Group.DECODE)),
    Kind.CUT_CALLS: (7, (Group.PREFILL, Group.DECODE)),
    Kind.CUT_CLIENTS: (4, (Group.FRONTEND,)),
    Kind.GARBAGE: (4, (Group.PREFILL, Group.DECODE)),
    Kind.FLIP_BITS: (8, (Group.DECODE,)),
    Kind.BLACKHOLE: (6, (Group.PREFILL, Group.DECODE)),
    Kind.OVERLOAD: (4, (Group.FRONTEND,)),
    Kind.PRESSURE: (5, (Group.DECODE,)),
    Kind.STAMPEDE: (4, (Group.FRONTEND,)),
}
_ENDS_PROCESSES = {Kind.KILL, Kind.KILL_ENGINE, Kind.KILL_MEMBER, Kind.DRAIN, Kind.ROLLING}
_ONLY_VLLM = {Kind.KILL_ENGINE, Kind.FLIP_BITS}
LOADS = frozenset({Kind.OVERLOAD, Kind.PRESSURE, Kind.STAMPEDE})
"""Faults that are nothing but requests."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The cluster and how hard it is used.

    Attributes:
        rate: requests a second that come by themselves.
        fault_every_s: mean time between two faults of a rough round.
        longest_answer: in tokens.
    """

    engine: EngineName = "simulated"
    prefill: int = 2
    decode: int = 2
    frontends: int = 2
    rate: float = 5.0
    fault_every_s: float = 4.0
    longest_answer: int = 96

    def members(self, group: Group) -> int:
        return {
            Group.PREFILL: self.prefill,
            Group.DECODE: self.decode,
            Group.FRONTEND: self.frontends,
            Group.PLANE: 1,
        }[group]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a client.

    Attributes:
        at_s: after its round's begin.
        which: prompt of its form.
        frontend: the first that it is sent to.
        stop_at: where in its answer (0 to 1) a stop string is taken from; None: it has none.
        leaves_after_s: after which its client goes away; None: it stays.
        read_pause_s: what its client rests between two pieces of a stream.
    """

    number: int
    at_s: float
    form: Form
    which: int
    face: Face
    frontend: int
    streamed: bool
    max_tokens: int
    n: int = 1
    stop_at: float | None = None
    logprobs: bool = False
    leaves_after_s: float | None = None
    read_pause_s: float = 0.0
    service_class: str = ""
    tenant: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """Attributes:
    at_s: after its round's begin.
    index: of the process in its group.
    hold_s: how long it lasts, where it lasts.
    """

    number: int
    at_s: float
    kind: Kind
    group: Group
    index: int
    hold_s: float

    @property
    def title(self) -> str:
        what = self.kind if self.kind in LOADS else f"{self.kind} of {self.group} {self.index}"
        return f"fault {self.number}: {what}" + (f" for {self.hold_s:.1f} s" if self.hold_s else "")


@dataclass(frozen=True, slots=True)
class Round:
    """Load and faults up to a quiet point.

    Attributes:
        kind: `calm` has no faults, `gentle` none that ends a process, `rough` all.
    """

    number: int
    kind: Literal["calm", "gentle", "rough"]
    load_s: float
    requests: tuple[PlannedRequest, ...]
    faults: tuple[PlannedFault, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes:
    spared: by group, the index of the process that is never ended: its memory is watched for as long as the run.
    """

    seed: int
    shape: Shape
    rounds: tuple[Round, ...]
    spared: dict[Group, int]


def draw(seed: int, minutes: float, shape: Shape) -> Plan:
    """The plan of a run: a pure function."""
    rng = random.Random(f"{seed}:chaos")
    spared = {group: rng.randrange(shape.members(group)) for group in (Group.PREFILL, Group.DECODE, Group.FRONTEND)}
    rounds: list[Round] = []
    total_s, end_s = 0.0, minutes * 60.0
    longest_s = min(60.0, end_s / 2.5)
    requests = faults = 0
    while not rounds or total_s + 0.5 * longest_s < end_s:
        load_s = rng.uniform(0.5, 1.0) * longest_s
        kind: Literal["calm", "gentle", "rough"] = "calm"
        if rounds:  # the first one warms up what the others are compared with
            kind = rng.choices(("calm", "gentle", "rough"), (1, 2, 6))[0] if len(rounds) > 1 else "rough"
        else:
            load_s = min(load_s, 15.0, 0.4 * longest_s)
        drawn = _faults(rng, kind, load_s, shape, spared, faults)
        asked = _requests(rng, load_s, drawn, shape, requests)
        rounds.append(Round(len(rounds), kind, load_s, asked, drawn))
        requests += len(asked)
        faults += len(drawn)
        total_s += load_s + _QUIET_S
    return Plan(seed, shape, tuple(rounds), spared)


def _faults(
    rng: random.Random, kind: str, load_s: float, shape: Shape, spared: dict[Group, int], first: int
) -> tuple[PlannedFault, ...]:
    if kind == "calm":
        return ()
    kinds = [
        one
        for one in _ROUGH
        if (kind == "rough" or one not in _ENDS_PROCESSES) and (shape.engine == "vllm" or one not in _ONLY_VLLM)
    ]
    weights = [_ROUGH[one][0] for one in kinds]
    drawn: list[PlannedFault] = []
    at_s = rng.uniform(0.5, 2.0)
    every_s = min(shape.fault_every_s, max(1.0, load_s / 8))  # a short run has no time to lose
    while at_s < load_s - 1.0:
        what = rng.choices(kinds, weights)[0]
        group = rng.choice(_ROUGH[what][1])
        index = rng.randrange(shape.members(group))
        if what in _ENDS_PROCESSES and group in spared and index == spared[group]:
            index = (index + 1) % shape.members(group)
        alone = shape.members(group) < 2 and group is not Group.PLANE
        hold_s = _hold_s(rng, what)
        if not (alone and what not in LOADS):
            drawn.append(PlannedFault(first + len(drawn), at_s, what, group, index, hold_s))
        at_s += rng.expovariate(1.0 / every_s) + 0.3
    return tuple(drawn)


def _hold_s(rng: random.Random, kind: Kind) -> float:
    lasts = {
        Kind.STOP_SHORT: (0.1, 0.8),
        Kind.STOP_LONG: (2.5, 6.0),
        Kind.FLIP_ROLE: (2.0, 8.0),
        Kind.FLIP_BITS: (0.2, 1.5),
        Kind.BLACKHOLE: (0.5, 5.0),
    }.get(kind)
    return rng.uniform(*lasts) if lasts else 0.0


def _requests(
    rng: random.Random, load_s: float, faults: tuple[PlannedFault, ...], shape: Shape, first: int
) -> tuple[PlannedRequest, ...]:
    drawn: list[PlannedRequest] = []
    at_s = 0.0
    while at_s < load_s:
        drawn += _steady(rng, at_s, shape)
        at_s += rng.expovariate(shape.rate)
    for fault in faults:
        if fault.kind is Kind.OVERLOAD:
            drawn += [_one(rng, fault.at_s + rng.uniform(0, 0.5), shape) for _ in range(round(24 * shape.rate))]
        elif fault.kind is Kind.PRESSURE:
            drawn += [_heavy(rng, fault.at_s + rng.uniform(0, 0.3), shape) for _ in range(12)]
        elif fault.kind is Kind.STAMPEDE:
            drawn += [
                _one(rng, fault.at_s, shape, leaves_after_s=rng.uniform(0.0, 1.0)) for _ in range(round(6 * shape.rate))
            ]
    drawn.sort(key=lambda one: one.at_s)
    return tuple(_numbered(one, first + index) for index, one in enumerate(drawn))


def _numbered(one: PlannedRequest, number: int) -> PlannedRequest:
    values = {name: getattr(one, name) for name in PlannedRequest.__slots__}
    return PlannedRequest(**(values | {"number": number}))


def _steady(rng: random.Random, at_s: float, shape: Shape) -> list[PlannedRequest]:
    """What comes at a moment: mostly one request, now and then the turns of a conversation."""
    if rng.random() < 0.06:
        conversation = rng.randrange(CONVERSATIONS)
        pause_s = rng.uniform(0.6, 2.0)
        return [
            _one(rng, at_s + turn * pause_s, shape, chat=conversation * TURNS + turn, leaves=False)
            for turn in range(TURNS)
        ]
    return [_one(rng, at_s, shape)]


def _one(
    rng: random.Random,
    at_s: float,
    shape: Shape,
    *,
    chat: int | None = None,
    leaves: bool = True,
    leaves_after_s: float | None = None,
) -> PlannedRequest:
    form = Form.CHAT if chat is not None else rng.choices(list(Form), (5, 3, 2))[0]
    counts = {Form.IDS: IDS, Form.TEXT: TEXTS, Form.CHAT: CONVERSATIONS * TURNS}
    face = rng.choices(list(Face), (3, 2))[0]
    streamed = face is Face.GRPC or rng.random() < 0.6
    if leaves_after_s is None and leaves and rng.random() < 0.12:
        leaves_after_s = min(3.0, rng.expovariate(2.0))
    return PlannedRequest(
        number=0,
        at_s=at_s,
        form=form,
        which=chat if chat is not None else rng.randrange(counts[form]),
        face=face,
        frontend=rng.randrange(shape.frontends),
        streamed=streamed,
        max_tokens=rng.randint(1, shape.longest_answer) if rng.random() < 0.9 else shape.longest_answer,
        n=rng.randint(2, 3) if face is Face.HTTP and rng.random() < 0.08 else 1,
        stop_at=rng.random() if rng.random() < 0.12 else None,
        logprobs=shape.engine == "vllm" and face is Face.GRPC and rng.random() < 0.2,
        leaves_after_s=leaves_after_s,
        read_pause_s=rng.uniform(0.02, 0.2) if streamed and rng.random() < 0.06 else 0.0,
        service_class=rng.choice(("", "", "realtime", "nearline", "batch")),
        tenant=rng.randrange(TENANTS) if rng.random() < 0.5 else None,
    )


def _heavy(rng: random.Random, at_s: float, shape: Shape) -> PlannedRequest:
    one = _one(rng, at_s, shape, leaves=False)
    values = {name: getattr(one, name) for name in PlannedRequest.__slots__}
    # The last prompts of the pool are the long ones.
    long = {"form": Form.IDS, "which": IDS - 1 - rng.randrange(12), "max_tokens": shape.longest_answer}
    return PlannedRequest(**(values | long | {"n": 1, "stop_at": None, "read_pause_s": 0.0}))


def lines(plan: Plan) -> list[str]:
    """The schedule, for people."""
    said = [
        f"seed {plan.seed}: {len(plan.rounds)} rounds, {sum(len(one.requests) for one in plan.rounds)} requests, "
        f"{sum(len(one.faults) for one in plan.rounds)} faults; never ended: "
        + ", ".join(f"{group} {index}" for group, index in plan.spared.items())
    ]
    for one in plan.rounds:
        said.append(f"round {one.number} ({one.kind}): {one.load_s:.1f} s, {len(one.requests)} requests")
        said += [f"  {fault.at_s:6.2f} s  {fault.title}" for fault in one.faults]
    return said
