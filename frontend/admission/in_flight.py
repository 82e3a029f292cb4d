"""What is with the workers now, how fast they take it, and whether one more would have to wait there.

Requests shall queue in the frontend, where fairness works, and not in the engines. So as many are let through as keep
the workers busy, and no more:

- until its prompt is computed a request holds a prefill worker. As many as there are prefill workers always go
  through; one more does when a worker is predicted to be done within `worker_wait_s`, so that it finds its next prompt
  there.
- until its end it holds a place in a decode worker's batch and room in its KV cache. There are as many as the workers
  say; what other frontends have there is what the workers report beyond our own.

The rate is work finished over the time in which workers had any, so that it does not count idle ones.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from frontend.admission.claim import Entry, Priority, Stage

E = TypeVar("E", bound=Entry)

START_WORK_PER_S = 2000.0
"""What a worker is taken to finish before any has finished anything; it counts like one second of experience."""

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
    """

    prefill_workers: int = 0
    decode_workers: int = 0
    places: int = 0
    kv_tokens: int = 0
    open_requests: int = 0
    kv_tokens_used: int = 0


class Lanes(Generic[E]):
    """The workers that compute prompts, one prompt after the other each: when is the next of them free?

    A prompt that takes longer than predicted holds its lane until it is done; one that is done early frees it.
    """

    def __init__(self, now_s: float) -> None:
        self.prompts = 0
        self._free_at_s = [now_s]  # one for each lane, sorted
        self._predicted: list[tuple[float, int, E]] = []  # a heap; those that ended are still in it
        self._ends_at_s: dict[E, float] = {}
        self._late: set[E] = set()
        self._count = 0
        self._at_s = now_s
        self._busy_s = 0.0  # lane-seconds with a prompt since the last finished one
        self._done_work, self._done_s = START_WORK_PER_S, 1.0

    def __len__(self) -> int:
        return len(self._free_at_s)

    @property
    def work_per_s(self) -> float:
        """Of one lane."""
        return self._done_work / self._done_s

    def resize(self, lanes: int, now_s: float) -> None:
        """Workers came or went."""
        self._pass(now_s)
        while len(self._free_at_s) < lanes:
            insort(self._free_at_s, now_s)
        del self._free_at_s[max(1, lanes) :]

    def free_in_s(self, now_s: float) -> float:
        """Predicted seconds until one is free; 0 when one certainly is."""
        if self.prompts < len(self._free_at_s):
            return 0.0
        while self._predicted and (self._predicted[0][0] < now_s or self._predicted[0][2] not in self._ends_at_s):
            _, _, entry = heapq.heappop(self._predicted)
            if entry in self._ends_at_s:
                self._late.add(entry)
        if len(self._late) >= len(self._free_at_s):
            return float("inf")
        return max(0.0, self._free_at_s[len(self._late)] - now_s)

    def begin(self, entry: E, now_s: float) -> None:
        """A prompt goes to the lane that is free first."""
        self._pass(now_s)
        ends_at_s = max(now_s, self._free_at_s.pop(0)) + entry.prompt_work / self.work_per_s
        insort(self._free_at_s, ends_at_s)
        self._count += 1
        self.prompts += 1
        self._ends_at_s[entry] = ends_at_s
        heapq.heappush(self._predicted, (ends_at_s, self._count, entry))

    def end(self, entry: E, now_s: float, *, computed: bool) -> None:
        """A prompt is computed, or given up."""
        self._pass(now_s)
        ends_at_s = self._ends_at_s.pop(entry)
        self._late.discard(entry)
        self.prompts -= 1
        if ends_at_s > now_s:
            place = bisect_left(self._free_at_s, ends_at_s)
            if place < len(self._free_at_s) and self._free_at_s[place] == ends_at_s:
                del self._free_at_s[place]
                insort(self._free_at_s, now_s)
        if len(self._predicted) > 2 * self.prompts + 64:
            self._predicted = [one for one in self._predicted if one[2] in self._ends_at_s]
            heapq.heapify(self._predicted)
        if computed:
            self._done_work = DECAY * self._done_work + entry.prompt_work
            self._done_s = DECAY * self._done_s + self._busy_s
            self._busy_s = 0.0

    def _pass(self, now_s: float) -> None:
        self._busy_s += max(0.0, now_s - self._at_s) * min(self.prompts, len(self._free_at_s))
        self._at_s = max(now_s, self._at_s)


class InFlight(Generic[E]):
    """Counts, and the lanes. Every time is the clock's, and never goes backwards.

    Args:
        worker_wait_s: predicted wait at a prefill worker up to which a request is let through.
    """

    def __init__(self, worker_wait_s: float, now_s: float) -> None:
        self._worker_wait_s = worker_wait_s
        self.room = ClusterRoom()
        self.lanes: Lanes[E] = Lanes(now_s)
        self.open = 0
        self.batch: dict[E, None] = {}
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
        self.lanes.resize(room.prefill_workers or room.decode_workers, now_s)

    def bottleneck(self, now_s: float) -> Bottleneck | None:
        """What one more request would wait for; None when it would not.

        With no decode worker there is nothing to wait for: the dispatcher says what is wrong.
        """
        room = self.room
        if not self.open or not room.decode_workers:
            return None
        if room.places and self.open + self._foreign_open >= room.places:
            return Bottleneck.DECODE
        if room.kv_tokens and self._kv_tokens + self._foreign_kv_tokens >= room.kv_tokens:
            return Bottleneck.DECODE
        if self.lanes.prompts >= len(self.lanes) and self.lanes.free_in_s(now_s) >= self._worker_wait_s:
            return Bottleneck.PREFILL
        return None

    def begin(self, entry: E, now_s: float) -> None:
        """A request goes to the workers."""
        entry.stage, entry.sent_s = Stage.PREFILL, now_s
        self.open += 1
        self._peak_open = max(self._peak_open, self.open)
        self._kv_tokens += entry.kv_tokens
        self.lanes.begin(entry, now_s)
        if entry.claim.priority is Priority.BATCH:
            self.batch[entry] = None

    def computed(self, entry: E, now_s: float) -> None:
        """Its prompt is computed, so that a prefill worker is free for another one."""
        self.lanes.end(entry, now_s, computed=True)
        entry.stage = Stage.DECODE

    def first_token(self, entry: E, now_s: float) -> None:
        """Its first token came since it was sent."""
        took_s = now_s - entry.sent_s
        self.first_token_s = DECAY * self.first_token_s + (1 - DECAY) * took_s if self.first_token_s else took_s

    def end(self, entry: E, now_s: float) -> None:
        """It is with the workers no longer, for whatever reason."""
        if entry.stage is Stage.PREFILL:
            self.lanes.end(entry, now_s, computed=False)
        entry.stage = Stage.GONE
        self.open -= 1
        assert self.open >= 0, "more requests ended than began"
        self._kv_tokens = self._kv_tokens - entry.kv_tokens if self.open else 0.0
        self.batch.pop(entry, None)
