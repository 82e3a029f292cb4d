"""A request in the simulated engine, what it is doing, and what the scheduler tells about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple


class Stage(Enum):
    """What a request is doing."""

    EXPECTING = auto()  # its prompt is to be received; the sender has not begun to compute it. Holds no blocks
    WAITING = auto()  # in the queue; holds blocks only if they were received
    RECEIVING = auto()  # holds the blocks of its whole prompt, which are being filled
    PREFILLING = auto()
    DECODING = auto()
    HELD = auto()  # prefill only: its prompt is computed, and its blocks stay until `release`
    OVER = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One request. The fields up to `cached_only` are its owner's; the scheduler keeps the others.

    Attributes:
        prompt_tokens: of which at least one is computed here, whatever is cached or received.
        max_tokens: to generate; 0: compute the prompt only, and hold its blocks until `Scheduler.release`.
        keys: block keys of the prompt (slipstream.block_keys). Its owner may append those of generated blocks once
            their tokens are known, or give them from the start; blocks without a key are not cached.
        priority: a lower one is served first.
        receives: blocks that are not cached here come from another worker, in place of being computed.
        cached_only: all but the last token have to be in the prefix cache; if not, it ends with `NOT_CACHED`.
        computed_tokens, cached_tokens, received_tokens: how the prompt came to be here; each token counts once.
        recomputed_tokens: computed again after a preemption.
        generated: tokens, as of the last change of stage; `Scheduler.generated` says it at any time.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    keys: list[int]
    priority: int = 0
    receives: bool = False
    cached_only: bool = False

    stage: Stage = field(default=Stage.WAITING, init=False)
    computed_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)
    received_tokens: int = field(default=0, init=False)
    recomputed_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    generated: int = field(default=0, init=False)
    prompt_done: bool = field(default=False, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    """Held, in the sequence's order."""
    done: int = field(default=0, init=False)
    """Tokens whose KV is there, while it is not decoding."""
    stored: int = field(default=0, init=False)
    """Blocks whose keys have been entered into the cache, or tried."""
    turn: int = field(default=0, init=False)
    """Changes with every stage: what was planned for an earlier one is void."""
    order: int = field(default=0, init=False)
    """Of arrival, and of admission once it runs."""
    arrival: int = field(default=0, init=False)
    since_tick: int = field(default=0, init=False)
    """The tick that gives it its next token after `generated`, while decoding."""
    uncounted: int = field(default=0, init=False)
    """Prompt tokens that it adds to `waiting_tokens`."""

    @property
    def tokens(self) -> int:
        """Known ones, of prompt and answer, while it is not decoding."""
        return self.prompt_tokens + self.generated


class EventKind(Enum):
    """What may happen to a request. A token of each decoding request comes with every step, without an event."""

    RECEIVING = auto()  # it has blocks, and waits to be told `received`
    PROMPT_COMPUTED = auto()  # once; with the first generated token if it generates any
    FINISHED = auto()  # all tokens are generated, and the blocks are free
    PREEMPTED = auto()  # lost its blocks, waits to be computed again
    NOT_CACHED = auto()  # `cached_only`, and too little was in the cache: it is over


class Event(NamedTuple):
    kind: EventKind
    request: Request


class Chunk(NamedTuple):
    """Tokens of a prompt that a step computes, after `before` ones."""

    request: Request
    turn: int
    new_tokens: int
    before: int


@dataclass(slots=True)
class Step:
    """One run of the model, or several in which the batch stays the same.

    Attributes:
        seconds: of all its ticks together; each takes `growth_s` longer than the one before, `first_s` is the first's.
        batch: requests that get one token each; the prompts that end in this step get their first one besides.
        context_tokens: of all of the batch together.
    """

    seconds: float
    chunks: list[Chunk]
    batch: int
    context_tokens: int
    started_s: float
    ticks: int = 1
    first_s: float = 0.0
    growth_s: float = 0.0

    def span_s(self, ticks: int) -> float:
        """Of that many of its first ticks."""
        return ticks * self.first_s + self.growth_s * (ticks * (ticks - 1) / 2)

    def ticks_by(self, now_s: float) -> int:
        """Ticks that are over at that time; the last one never is, before the step is finished."""
        if self.ticks == 1 or now_s < self.started_s + self.first_s:
            return 0
        passed_s = now_s - self.started_s
        ticks = min(self.ticks - 1, int(passed_s / self.first_s))
        while ticks and self.span_s(ticks) > passed_s:
            ticks -= 1
        while ticks < self.ticks - 1 and self.span_s(ticks + 1) <= passed_s:
            ticks += 1
        return ticks


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """As in the registry's Load."""

    running: int
    waiting: int
    blocks_used: int
    waiting_tokens: int
    context_tokens: int
    held: int
    preemptions: int
