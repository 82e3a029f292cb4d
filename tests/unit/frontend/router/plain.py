"""The default policy's costs in the plainest way: one worker after the other, every pair, no vectors.

Written from the description in `frontend.router.cost`, from candidates and not from a pool's columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from frontend.router import Ask, Fleet
from frontend.router.by_time import MARGIN_SHARE
from frontend.router.candidate import CROWDING_S, Candidate
from frontend.router.cost import UNKNOWN_OUTPUT_TOKENS, UNKNOWN_WAIT_S
from frontend.router.pool import MAX_ECHO, TIE_SHARE
from frontend.router.ways import exposed_s, way
from slipstream.v1.registry_pb2 import Role


@dataclass(frozen=True, slots=True)
class Choice:
    """`prefill` is empty for decode alone; `ordered_s` is what is compared."""

    prefill: str
    decode: str
    ordered_s: float
    ready_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plain:
    """One question to one fleet."""

    ask: Ask
    fleet: Fleet
    now_s: float

    def pairs(self) -> Iterator[Choice]:
        """Every pair that can exchange blocks."""
        for prefill in self.usable(Role.ROLE_PREFILL, self.ask.prompt_tokens):
            queue_s, own_s = self.queue_s(prefill, self.echo(Role.ROLE_PREFILL)), self.alone_s(prefill)
            prefill_s = self.ordered_s(prefill, queue_s + own_s * (1.0 + self.behind()))
            for decode in self.usable(Role.ROLE_DECODE, self.ask.prompt_tokens + self.ask.max_tokens):
                the_way = way(decode, prefill)
                if the_way is None:
                    continue
                moved_tokens = self.ask.prompt_tokens - 1 - self.known(decode)
                moved_s = exposed_s(decode, the_way, moved_tokens, own_s, decode.handoff.factor)
                arrives_s, slot_s = queue_s + own_s + moved_s, self.slot_s(decode)
                cost_s = prefill_s + self.decode_s(decode) + moved_s - min(arrives_s, slot_s)
                ready_s = arrives_s + max(0.0, slot_s - arrives_s)
                yield Choice(prefill.worker_id, decode.worker_id, cost_s, ready_s)

    def alone(self) -> Iterator[Choice]:
        """Every decode worker."""
        for one in self.usable(Role.ROLE_DECODE, self.ask.prompt_tokens + self.ask.max_tokens):
            requests, known = self.requests(one), self.known(one)
            new_tokens = self.ask.prompt_tokens - known
            chunks_s = one.curve.predictor.chunk_s(new_tokens, known) * one.prefill.factor
            steps_s = one.curve.predictor.steps_s(new_tokens) * one.prefill.factor
            if requests:
                steps_s = math.ceil(new_tokens / one.curve.predictor.profile.step_tokens) * self.step_now_s(one)
            wait_s = self.queue_s(one, 0.0) + chunks_s * (1 + requests) + steps_s
            yield Choice("", one.worker_id, self.decode_s(one) + wait_s)

    def best(self, *, always_hand_off: bool) -> Choice:
        """The whole decision."""
        alone = min(self.alone(), key=lambda one: one.ordered_s)
        pair = min(self.pairs(), key=lambda one: one.ordered_s, default=None) if self.ask.prompt_tokens > 1 else None
        if pair is None:
            return alone
        saved_s = pair.ordered_s - alone.ordered_s
        return alone if not always_hand_off and saved_s > MARGIN_SHARE * pair.ready_s else pair

    # -- one worker ---------------------------------------------------------------------------------------

    def members(self, role: Role.ValueType) -> list[Candidate]:
        pool = self.fleet.pool(self.ask.model, role)
        return pool.members if pool is not None else []

    def usable(self, role: Role.ValueType, tokens: int) -> list[Candidate]:
        barred = self.ask.excluded | self.ask.suspects
        there = [one for one in self.members(role) if one.takes_requests and one.worker_id not in barred]
        long = [one for one in there if (one.record.capacity.max_model_len or math.inf) >= tokens]
        return long or there

    def known(self, one: Candidate) -> int:
        return max(0, min(self.ask.known.get(one.worker_id, 0), self.ask.prompt_tokens - 1))

    def requests(self, one: Candidate) -> int:
        return one.requests + one.foreign.requests

    def echo(self, role: Role.ValueType) -> float:
        own = sum(one.requests for one in self.members(role))
        return min(sum(one.foreign.requests for one in self.members(role)) / own, MAX_ECHO) if own else 0.0

    def behind(self) -> float:
        prefills = self.members(Role.ROLE_PREFILL)
        jobs = sum(one.jobs + (one.foreign.requests if one.foreign.waiting_tokens else 0) for one in prefills)
        return jobs / len(prefills)

    def queue_s(self, one: Candidate, echo: float) -> float:
        job_s = one.pending_s / one.jobs if one.jobs else 0.0
        if one.heard:
            return max(one.free_at_s - self.now_s, one.pending_s - job_s) + one.fresh_s * echo
        foreign_s = one.foreign.waiting_tokens * one.curve.s_per_token * one.prefill.factor
        done_s = min(self.now_s - one.since_s, job_s)
        return one.pending_s - done_s + foreign_s + one.fresh_s * echo

    def alone_s(self, one: Candidate) -> float:
        known = self.known(one)
        return one.curve.predictor.prefill_s(self.ask.prompt_tokens - known, known) * one.prefill.factor

    def step_at_s(self, one: Candidate, requests: int, context_tokens: float) -> float:
        return one.curve.predictor.decode_s(requests, context_tokens / max(1, requests)) * one.step.factor

    def step_now_s(self, one: Candidate) -> float:
        return self.step_at_s(one, self.requests(one), one.context_tokens + one.foreign.context_tokens)

    def answer_tokens(self) -> float:
        expected = self.ask.expected_tokens or UNKNOWN_OUTPUT_TOKENS
        return max(1.0, min(expected, self.ask.max_tokens or expected))

    def step_s(self, one: Candidate) -> float:
        """With this request, and with what others are taken to have sent meanwhile."""
        requests, context = self.requests(one), one.context_tokens + one.foreign.context_tokens
        with_one_s = self.step_at_s(one, requests + 1, context)
        next_token_s = self.step_at_s(one, requests + 1, context + requests + 1)
        per_token_s = max(0.0, next_token_s - with_one_s) / (requests + 1)
        more_s = max(0.0, with_one_s - self.step_now_s(one))
        others = one.fresh_requests * self.echo(Role.ROLE_DECODE)
        mean_tokens = self.ask.prompt_tokens + self.answer_tokens() / 2
        return self.step_now_s(one) + more_s * (1 + others) + per_token_s * mean_tokens

    def slot_s(self, one: Candidate) -> float:
        capacity, answer_s = one.record.capacity, self.step_s(one) * self.answer_tokens()
        requests = self.requests(one) + one.fresh_requests * self.echo(Role.ROLE_DECODE)
        most = capacity.max_running or math.inf
        place_s = max(0.0, requests + 1 - most) * answer_s / most
        used, needed = one.blocks_used + one.fresh_blocks, math.ceil((self.ask.prompt_tokens + 1) / one.block_tokens)
        short = used + needed - capacity.blocks if capacity.blocks else 0
        blocks_s = 0.0
        if short > 0:
            blocks_s = short / max(1, used) * answer_s if requests > 0 else UNKNOWN_WAIT_S
        return max(place_s, blocks_s)

    def decode_s(self, one: Candidate) -> float:
        tokens, step_s = self.answer_tokens(), self.step_s(one)
        requests = self.requests(one) + one.fresh_requests * self.echo(Role.ROLE_DECODE)
        others_s = requests * (step_s - self.step_now_s(one)) * tokens
        return self.ordered_s(one, self.slot_s(one) + step_s * tokens + others_s)

    def ordered_s(self, one: Candidate, cost_s: float) -> float:
        tie = float(one.pool.tie[one.row])
        used = (one.blocks_used + one.fresh_blocks) / max(1, one.record.capacity.blocks)
        return cost_s * (1.0 + TIE_SHARE * tie) + round(used, 1) * CROWDING_S + 1e-6 * tie
