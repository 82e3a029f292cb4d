"""What is with the workers now, how fast they take it, and whether one more would have to wait there.

Requests shall queue in the frontend, where fairness works, and not in the engines. So as many are let through as keep
the workers busy, and no more:

- until its prompt is computed a request holds a prefill worker. As many as there are prefill workers always go
  through, and short ones until there is a full step for each, since an engine computes them together; one more does
  when a worker is predicted to be done within `worker_wait_s`, so that it finds its next prompt there.
- until its end it holds a place in a decode worker's batch and room in its KV cache. There are as many as the workers
  say; what other frontends have there is what the workers report beyond our own.

The rate is work finished over the time in which workers had any, so that it does not count idle ones.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter
from typing import Generic, TypeVar

from frontend.admission.claim import Entry, Priority, Stage
from frontend.admission.lately import Company, Lately

E = TypeVar("E", bound=Entry)

START_WORK_PER_S = 2000.0
"""What a worker is taken to finish before any has finished anything; it counts like one second of experience."""

STEP_WORK = 1024.0
"""Work that one engine step does in hardly more time than a short prompt: beyond it, prompts gain little together."""

DECAY = 0.98
"""What earlier experience weighs after each newer prompt: some fifty prompts count."""


class Bottleneck(StrEnum):
    """What a request would wait for at the workers."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ClusterRoom:
    """What the workers have, summed over those that take requests. Zero is for what is not known.

    Attributes:
        places: requests that the decode workers compute at the same time.
        kv_tokens: tokens that their KV caches hold.
        open_requests, kv_tokens_used: by their own last word, whoever sent the requests.
        frontends: that sent them requests lately, as far as one worker can tell.
    """

    prefill_workers: int = 0
    decode_workers: int = 0
    places: int = 0
    kv_tokens: int = 0
    open_requests: int = 0
    kv_tokens_used: int = 0
    frontends: int = 1


@dataclass(frozen=True, slots=True)
class Others:
    """What other frontends do with the same workers.

    Attributes:
        frontends: that sent requests lately, this one with them.
        prefill_workers: those that compute others' prompts now.
    """

    frontends: int = 1
    prefill_workers: int = 0


ALONE = Others()


@dataclass(slots=True, eq=False)
class _Lane(Generic[E]):
    """One worker: its prompts in their order, and when it is predicted to be done with them."""

    free_at_s: float
    prompts: dict[E, float] = field(default_factory=dict)  # with the predicted end of each


class Lanes(Generic[E]):
    """The workers that compute prompts, one prompt after the other each: when is the next of them free?

    Which worker really has a prompt is the router's business; that it takes the one that is free first is assumed. A
    prompt that takes longer than predicted holds its lane until it is done, and moves what is behind it.
    """

    def __init__(self, now_s: float) -> None:
        self._by_free: list[_Lane[E]] = [_Lane(now_s)]  # by `free_at_s`
        self._lane_of: dict[E, _Lane[E]] = {}
        self._work = 0.0
        self._at_s = now_s
        self._busy_s = 0.0  # lane-seconds with a prompt since the last finished one
        self._done_work, self._done_s = START_WORK_PER_S, 1.0

    def __len__(self) -> int:
        return len(self._by_free)

    @property
    def prompts(self) -> int:
        """Not yet computed."""
        return len(self._lane_of)

    @property
    def work_per_s(self) -> float:
        """Of one lane."""
        return self._done_work / self._done_s

    def resize(self, lanes: int, now_s: float) -> None:
        """Workers came or went, or others use them; prompts of those that went keep a lane that nothing is added to.

        The first that would be free goes first: it is the one that others send their prompts to.
        """
        self._pass(now_s)
        while len(self._by_free) < lanes:
            self._place(_Lane(now_s))
        del self._by_free[: len(self._by_free) - max(1, lanes)]

    def free_in_s(self, now_s: float) -> float:
        """Predicted seconds until one is free; 0 when one is, infinite when each is late already."""
        if self._work < STEP_WORK * len(self._by_free):
            return 0.0
        for lane in self._by_free:
            if lane.free_at_s > now_s:
                return lane.free_at_s - now_s
            if not lane.prompts:
                return 0.0
        return float("inf")

    def begin(self, entry: E, now_s: float) -> None:
        """A prompt goes to the lane that is free first."""
        self._pass(now_s)
        lane = next((one for one in self._by_free if one.free_at_s > now_s or not one.prompts), self._by_free[0])
        self._by_free.remove(lane)
        lane.free_at_s = max(now_s, lane.free_at_s) + entry.prompt_work / self.work_per_s
        lane.prompts[entry] = lane.free_at_s
        self._lane_of[entry] = lane
        self._work += entry.prompt_work
        self._place(lane)

    def end(self, entry: E, now_s: float, *, computed: bool) -> None:
        """A prompt is computed, or given up: what is behind it begins now."""
        self._pass(now_s)
        lane = self._lane_of.pop(entry)
        del lane.prompts[entry]
        self._work = self._work - entry.prompt_work if self._lane_of else 0.0
        ends_at_s, work_per_s = now_s, self.work_per_s
        for one in lane.prompts:
            ends_at_s += one.prompt_work / work_per_s
            lane.prompts[one] = ends_at_s
        lane.free_at_s = ends_at_s
        if lane in self._by_free:
            self._by_free.remove(lane)
            self._place(lane)
        if computed:
            self._done_work = DECAY * self._done_work + entry.prompt_work
            self._done_s = DECAY * self._done_s + self._busy_s
            self._busy_s = 0.0

    def _place(self, lane: _Lane[E]) -> None:
        insort(self._by_free, lane, key=attrgetter("free_at_s"))

    def _pass(self, now_s: float) -> None:
        self._busy_s += max(0.0, now_s - self._at_s) * min(self.prompts, len(self._by_free))
        self._at_s = max(now_s, self._at_s)


class InFlight(Generic[E]):
    """Counts, and the lanes. Every time is the clock's, and never goes backwards.

    Args:
        worker_wait_s: predicted wait at a prefill worker up to which a request is let through.
        alone_wait_s: the same, where there is no second tenant, class or frontend.
    """

    def __init__(self, worker_wait_s: float, alone_wait_s: float, now_s: float) -> None:
        self._worker_wait_s = worker_wait_s
        self._alone_wait_s = max(worker_wait_s, alone_wait_s)
        self.company = Company()
        self.room = ClusterRoom()
        self.others = ALONE
        self.lanes: Lanes[E] = Lanes(now_s)
        self.open = 0
        self.batch: dict[E, None] = {}
        self.prompts_of: dict[str, tuple[int, float]] = {}
        """By tenant: prompts that are not yet computed, and the tenant's weight."""
        self._lately = Lately(now_s)
        self.first_token_s = 0.0
        self._kv_tokens = 0.0
        self._peak_open, self._last_peak_open = 0, 0
        self._foreign_open, self._foreign_kv_tokens = 0, 0.0

    @property
    def work_per_s(self) -> float:
        """Prompt work that all lanes together finish."""
        return len(self.lanes) * self.lanes.work_per_s

    def take(self, room: ClusterRoom, now_s: float) -> None:
        """The workers' newer figures. Our own requests in them may have ended since, or not have arrived."""
        own = max(self._peak_open, self._last_peak_open)
        self._foreign_open = max(0, room.open_requests - own)
        share = self._foreign_open / room.open_requests if room.open_requests else 0.0
        self._foreign_kv_tokens = room.kv_tokens_used * share
        self._last_peak_open, self._peak_open = self._peak_open, self.open
        self.room = room
        self._share_lanes(now_s)

    def take_others(self, others: Others, now_s: float) -> None:
        """What other frontends do now."""
        workers = self.room.prefill_workers or self.room.decode_workers
        self._lately.passed(min(self.lanes.prompts, workers), self.others.prefill_workers, now_s)
        if others != self.others:
            self.others = others
            self._share_lanes(now_s)

    def overlooked(self, waiting: Mapping[str, float], now_s: float) -> str | None:
        """A tenant that asks for little, of those that wait (by weight): it need not wait for a worker to be free.

        It had less than its part lately, and has less than its part of the workers now: of those that this frontend's
        tenants share, or of those that frontends share where it is this one's only tenant.
        """
        workers = self.room.prefill_workers or self.room.decode_workers
        if self.lanes.prompts >= len(self.lanes) + workers:
            return None
        weights = sum((weight for name, (_, weight) in self.prompts_of.items() if name not in waiting), 0.0)
        weights += sum(waiting.values())
        for name, weight in waiting.items():
            prompts, _ = self.prompts_of.get(name, (0, 0.0))
            if prompts >= workers:
                continue
            if weight < weights:
                below = self._lately.tenant_is_below(name, weight / weights, now_s)
            else:
                below = self._lately.frontend_is_below(1.0 / self.others.frontends, now_s)
            if below:
                return name
        return None

    def _end_prompt(self, entry: E, now_s: float, *, computed: bool) -> None:
        self.lanes.end(entry, now_s, computed=computed)
        prompts, weight = self.prompts_of.pop(entry.claim.tenant)
        if prompts > 1:
            self.prompts_of[entry.claim.tenant] = prompts - 1, weight

    def _share_lanes(self, now_s: float) -> None:
        workers = self.room.prefill_workers or self.room.decode_workers
        self.lanes.resize(self._share(workers, self.others.prefill_workers), now_s)

    def _share(self, whole: int, foreign: int) -> int:
        """Of something that all frontends use: what the others leave, and an equal part at least."""
        frontends = self.others.frontends
        return max(whole - foreign, whole // frontends if frontends > 1 else 0)

    def bottleneck(self, now_s: float) -> Bottleneck | None:
        """What one more request would wait for; None when it would not.

        With no decode worker there is nothing to wait for: the dispatcher says what is wrong.
        """
        room = self.room
        if not self.open or not room.decode_workers:
            return None
        if room.places and self.open >= self._share(room.places, self._foreign_open):
            return Bottleneck.DECODE
        if room.kv_tokens and self._kv_tokens >= self._share(room.kv_tokens, int(self._foreign_kv_tokens)):
            return Bottleneck.DECODE
        if self.lanes.prompts >= len(self.lanes) and self.lanes.free_in_s(now_s) >= self._wait_s(now_s):
            return Bottleneck.PREFILL
        return None

    def _wait_s(self, now_s: float) -> float:
        alone = self.others.frontends == 1 and not self.batch and self.company.none_at(now_s)
        return self._alone_wait_s if alone else self._worker_wait_s

    def begin(self, entry: E, now_s: float) -> None:
        """A request goes to the workers."""
        entry.stage, entry.sent_s = Stage.PREFILL, now_s
        self.open += 1
        self._peak_open = max(self._peak_open, self.open)
        self._kv_tokens += entry.kv_tokens
        self.lanes.begin(entry, now_s)
        prompts, _ = self.prompts_of.get(entry.claim.tenant, (0, 0.0))
        self.prompts_of[entry.claim.tenant] = prompts + 1, entry.claim.weight
        self._lately.sent(entry, now_s)
        if entry.claim.priority is Priority.BATCH:
            self.batch[entry] = None

    def computed(self, entry: E, now_s: float) -> None:
        """Its prompt is computed, so that a prefill worker is free for another one."""
        self._end_prompt(entry, now_s, computed=True)
        entry.stage = Stage.DECODE

    def first_token(self, entry: E, now_s: float) -> None:
        """Its first token came since it was sent."""
        took_s = now_s - entry.sent_s
        self.first_token_s = DECAY * self.first_token_s + (1 - DECAY) * took_s if self.first_token_s else took_s

    def end(self, entry: E, now_s: float) -> None:
        """It is with the workers no longer, for whatever reason."""
        if entry.stage is Stage.PREFILL:
            self._end_prompt(entry, now_s, computed=False)
        entry.stage = Stage.GONE
        self.open -= 1
        assert self.open >= 0, "more requests ended than began"
        self._kv_tokens = self._kv_tokens - entry.kv_tokens if self.open else 0.0
        self.batch.pop(entry, None)
