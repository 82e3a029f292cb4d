"""The half of the connector that lives in vLLM's scheduler: decides what is received and sent, and counts.

A request that brings a handoff to receive waits, without blocks, until the sender has begun to compute it; then it gets
blocks and waits for them to be filled (WAITING_FOR_REMOTE_KVS). The last prompt token is never received: it is computed
here, to sample the first token. A request asks once; after a failure, or a preemption, it computes its prompt here.

A request that brings a lease is sent while it is computed: each step says which blocks it finishes. When the prompt is
complete its blocks are pinned until the receiver has them or the lease ends; releases and deadlines are looked up here,
on the board of this host, and told to the ranks, which may be on others.

Where the engine has several tensor-parallel ranks each has its part of every block, and sends and receives it by
itself. Here they are put together: a prompt has begun when it has begun for all ranks, its blocks are here when all
ranks have theirs, and a transfer that has failed on one rank is given up on all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from kv_transfer.accounts import Accounts, TransferReport
from kv_transfer.board import Board, Counter, Outcome, Word
from kv_transfer.handoff import Handoff, digest_tokens
from kv_transfer.permits import Permit
from kv_transfer.rank_reports import RankReports
from slipstream import telemetry

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = telemetry.get_logger(__name__)

# Keys of a request's `kv_transfer_params`, in and out.
SEND = "slipstream_send"  # in: (slot, nonce, handoff id, cached only, token, receiver's key)
RECEIVE = "slipstream_receive"  # in: (handoff id, address, epoch, several ranks' addresses, patience_s, key, token)
ACCOUNT = "slipstream_account"  # out: Account as a dict

_ENDED = {
    Outcome.TAKEN: Counter.HANDOFFS_TAKEN,
    Outcome.RELEASED: Counter.HANDOFFS_RELEASED,
    Outcome.EXPIRED: Counter.HANDOFFS_EXPIRED,
}
# Of the prompt of a sender whose ranks do not compute the same: no prompt has it.
_NO_DIGEST = -1


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks to receive: those of the prompt from index `first` on, into `targets`."""

    request_id: str
    first: int
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Send:
    """What one step does to a prompt that is being sent.

    Attributes:
        begin: (tokens, digest) when this is the first step of it, or the first after a preemption.
        block_ids: the prompt's block table, as far as it is known.
        ready: blocks [0, ready) are there before the step; only with `begin`.
        first, end: blocks that the step completes.
        final: the step computes the last token of the prompt.
    """

    handoff_id: bytes
    begin: tuple[int, int] | None
    block_ids: list[int]
    ready: int
    first: int
    end: int
    final: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """Blocks to keep until they are taken, or the request is among those of `Step.over`."""

    request_id: str
    handoff_id: bytes


@dataclass(slots=True)
class Step:
    """Decisions since the last step, for the worker side.

    Attributes:
        tokens: that this step computes; 0: it has nothing to do but this.
        expects: handoffs whose prompts have come, and wait to be computed.
        resets: handoffs whose blocks may be overwritten by this step. ends: (handoff, why) that are over.
        opens: handoffs to wait for. cancels: requests that are not waited for any more.
        over: (request, outcome) of leases that have ended, whether or not all ranks' blocks have been taken.
    """

    tokens: int = 0
    expects: list[Permit] = field(default_factory=list)
    resets: list[bytes] = field(default_factory=list)
    ends: list[tuple[bytes, str]] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    over: list[tuple[str, Outcome]] = field(default_factory=list)
    opens: list[tuple[str, Handoff]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)


class _Stage(Enum):
    OPENED = "opened"
    STARTED = "started"
    LOADING = "loading"
    OVER = "over"  # received, failed or never usable: the rest is computed here


@dataclass(slots=True)
class _Incoming:
    stage: _Stage
    prompt_tokens: int
    until_s: float = 0.0  # give up waiting for the sender to begin; 0: never
    tokens: int = 0
    digest: int = 0
    begun: dict[int, tuple[int, int]] = field(default_factory=dict)  # (tokens, digest) by rank


@dataclass(slots=True)
class _Outgoing:
    handoff_id: bytes
    slot: int
    nonce: int
    tokens: int
    digest: int
    begun: bool = False
    opened: bool = False  # counted; a preemption makes it begin once more
    published: int = 0  # blocks


@dataclass(slots=True)
class _Held:
    """A lease whose blocks are pinned, in any case until `until_ns` (CLOCK_MONOTONIC).

    Attributes:
        told: the ranks know that it has ended.
        outcome: of the ranks for which it has ended.
    """

    slot: int
    nonce: int
    until_ns: int
    told: bool = False
    outcome: Outcome = Outcome.TAKEN


class SchedulerSide:
    """State of all requests in the engine that transfer something.

    Args:
        ranks: of the engine; each sends and receives its part.
    """

    def __init__(self, board: Board, *, block_tokens: int, lease_s: float, ranks: int = 1) -> None:
        self._board = board
        self._ranks = ranks
        self._reports = RankReports(ranks)
        self._held: dict[str, _Held] = {}
        self._block_tokens = block_tokens
        self._lease_s = lease_s
        self._pool: BlockPool | None = None
        self._accounts = Accounts(board)
        self._incoming: dict[str, _Incoming] = {}
        self._outgoing: dict[str, _Outgoing] = {}
        self._step = Step()

    def bind_pool(self, pool: BlockPool) -> None:
        self._pool = pool
        # One block is vLLM's placeholder; nobody can have it.
        self._board.set_gauge(Counter.BLOCKS_TOTAL, pool.num_gpu_blocks - 1)
        self.publish_gauges()

    def publish_gauges(self) -> None:
        if self._pool is not None:
            self._board.set_gauge(Counter.BLOCKS_FREE, self._pool.get_num_free_blocks())
        self._board.set_gauge(Counter.HANDOFFS_HELD, len(self._held))

    # -- receiving ----------------------------------------------------------------------------------------

    def receivable_tokens(self, request: Request, local_tokens: int) -> int | None:
        """Prompt tokens to receive beyond the `local_tokens` of the prefix cache; 0: compute them; None: ask later."""
        params = request.kv_transfer_params or {}
        if SEND in params and not self._may_send(request, params[SEND], local_tokens):
            return None
        if RECEIVE not in params:
            return 0
        incoming = self._incoming.get(request.request_id)
        if incoming is None:
            incoming = self._incoming[request.request_id] = self._open(request, params[RECEIVE], local_tokens)
        if incoming.stage is _Stage.OPENED:
            if incoming.until_s and time.monotonic() > incoming.until_s:
                self._give_up(request, incoming, "timeout")
                return 0
            return None
        if incoming.stage is not _Stage.STARTED:
            return 0
        if digest_tokens((request.prompt_token_ids or [])[: incoming.tokens]) != incoming.digest:
            self._give_up(request, incoming, "bad_handoff")
            return 0
        tokens = min(incoming.tokens, int(request.num_tokens) - 1) - local_tokens
        if tokens <= 0:
            self._drop(request.request_id, incoming)
        return max(0, tokens)

    def _open(self, request: Request, raw: Sequence[Any], local_tokens: int) -> _Incoming:
        # At least one prompt token has to be computed, to sample from; is all the rest here?
        if local_tokens >= int(request.num_tokens) - 1:
            return _Incoming(_Stage.OVER, request.num_prompt_tokens)
        handoff_id, address, epoch, ranks, patience_s, key, token = raw
        handoff = Handoff(bytes(handoff_id), address, epoch, bytes(key), bytes(token), tuple(ranks))
        self._step.opens.append((request.request_id, handoff))
        until_s = time.monotonic() + patience_s if patience_s else 0.0
        return _Incoming(_Stage.OPENED, request.num_prompt_tokens, until_s)

    def _give_up(self, request: Request, incoming: _Incoming, code: str) -> None:
        self._drop(request.request_id, incoming)
        self._accounts.open(request.request_id, request.num_prompt_tokens)
        self._accounts.book(request.request_id, TransferReport(failure=code))

    def _drop(self, request_id: str, incoming: _Incoming) -> None:
        incoming.stage = _Stage.OVER
        self._step.cancels.append(request_id)

    def start_load(self, request: Request, block_ids: Sequence[int], tokens: int) -> None:
        """Receive `tokens` tokens that end the first `receivable` ones, into this request's blocks."""
        incoming = self._incoming.get(request.request_id)
        if incoming is None or incoming.stage is not _Stage.STARTED:
            return
        incoming.stage = _Stage.LOADING
        last = min(incoming.tokens, request.num_tokens - 1)
        first = (last - tokens) // self._block_tokens
        end = -(-last // self._block_tokens)
        self._step.loads.append(Load(request.request_id, first, list(block_ids[first:end])))
        self._accounts.expect(request.request_id, request.num_prompt_tokens, tokens)

    def take_started(self, started: Mapping[str, Mapping[int, tuple[int, int]]]) -> None:
        """Senders have begun to compute these: (tokens, digest) of the prompt, by rank."""
        for request_id, begun in started.items():
            incoming = self._incoming.get(request_id)
            if incoming is None or incoming.stage is not _Stage.OPENED:
                continue
            incoming.begun.update(begun)
            if len(incoming.begun) == self._ranks:
                prompts = set(incoming.begun.values())
                incoming.stage = _Stage.STARTED
                incoming.tokens, incoming.digest = prompts.pop() if len(prompts) == 1 else (0, _NO_DIGEST)

    def take_reports(self, of_ranks: Mapping[str, Mapping[int, TransferReport]]) -> None:
        """Transfers have ended, by rank; called before the scheduler acts on them."""
        for request_id, reports in of_ranks.items():
            report = self._reports.take(request_id, reports)
            if report is None:
                continue
            if report.failure and self._reports.outstanding(request_id):
                self._step.cancels.append(request_id)  # the other ranks' parts are of no use any more
            incoming = self._incoming.get(request_id)
            if incoming is not None:
                if incoming.stage is _Stage.OVER:
                    continue  # given up here already, and counted
                incoming.stage = _Stage.OVER
                self._accounts.open(request_id, incoming.prompt_tokens)
            self._accounts.book(request_id, report)

    # -- sending ------------------------------------------------------------------------------------------

    def note_new(self, request: Request) -> None:
        """A request has come; it may wait long before it is asked anything."""
        raw = (request.kv_transfer_params or {}).get(SEND)
        if raw is not None:
            self._step.expects.append(Permit(bytes(raw[2]), bytes(raw[4]), bytes(raw[5])))

    def _may_send(self, request: Request, raw: Sequence[Any], local_tokens: int) -> bool:
        """Note the request's lease. False when it asks for what the prefix cache has, and that is not enough."""
        outgoing = self._outgoing.get(request.request_id)
        if outgoing is None:
            slot, nonce, handoff_id, cached_only, _, _ = raw
            prompt = request.prompt_token_ids or []
            tokens = len(prompt) - 1 if cached_only else len(prompt)
            outgoing = _Outgoing(bytes(handoff_id), int(slot), int(nonce), tokens, digest_tokens(prompt[:tokens]))
            self._outgoing[request.request_id] = outgoing
            if cached_only and local_tokens < tokens:
                self._board.put(outgoing.slot, Word.OUTCOME, outgoing.nonce | Outcome.NOT_CACHED)
                self._board.add(Counter.HANDOFFS_NOT_CACHED)
                self._step.ends.append((outgoing.handoff_id, "not_cached"))
        return self._board.outcome(outgoing.slot, outgoing.nonce) is not Outcome.NOT_CACHED

    def _plan_send(
        self, outgoing: _Outgoing, block_ids: list[int], computed: int, scheduled: int, unwritten: set[int]
    ) -> Send:
        """What this step finishes of a prompt of which `computed` tokens are there before it.

        Args:
            unwritten: blocks that other requests write in this step. vLLM gives out a block of the prefix cache as
                soon as its computation is planned: it may be a hit here and yet be empty before this step.
        """
        begin = None
        ready = 0
        if not outgoing.begun:
            outgoing.begun = True
            if not outgoing.opened:
                outgoing.opened = True
                self._board.add(Counter.HANDOFFS_OPENED)
            begin = (outgoing.tokens, outgoing.digest)
            hits = computed // self._block_tokens
            ready = next((n for n, block_id in enumerate(block_ids[:hits]) if block_id in unwritten), hits)
            outgoing.published = ready
        after = computed + scheduled
        final = after >= outgoing.tokens
        end = -(-outgoing.tokens // self._block_tokens) if final else after // self._block_tokens
        first, outgoing.published = outgoing.published, max(end, outgoing.published)
        return Send(outgoing.handoff_id, begin, block_ids, ready, first, end, final)

    # -- every step ---------------------------------------------------------------------------------------

    def take_step(self, output: SchedulerOutput) -> Step:
        """Count the prompt tokens of this step; hand over what was decided since the last one."""
        for request_id in output.preempted_req_ids or ():
            self._board.add(Counter.PREEMPTIONS)
            outgoing = self._outgoing.get(request_id)
            if outgoing is not None and outgoing.begun:
                outgoing.begun = False
                self._board.add(Counter.HANDOFFS_RESET)
                self._step.resets.append(outgoing.handoff_id)
        for new in output.scheduled_new_reqs:
            scheduled = output.num_scheduled_tokens[new.req_id]
            self._accounts.first_step(new.req_id, len(new.prompt_token_ids or ()), new.num_computed_tokens, scheduled)
            self._send(output, new.req_id, new.num_computed_tokens, scheduled)
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            scheduled = output.num_scheduled_tokens[request_id]
            self._accounts.next_step(request_id, computed, scheduled)
            self._send(output, request_id, computed, scheduled)
        self._end_leases()
        self.publish_gauges()
        step, self._step = self._step, Step()
        step.tokens = output.total_num_scheduled_tokens
        self._board.set_gauge(Counter.STEP_TOKENS, step.tokens)
        self._board.add(Counter.STEPS)
        return step

    def _send(self, output: SchedulerOutput, request_id: str, computed: int, scheduled: int) -> None:
        outgoing = self._outgoing.get(request_id)
        if outgoing is None or (outgoing.begun and computed >= outgoing.tokens):
            return
        tables = output.kv_connector_block_state
        table = tables.get_block_ids(request_id) if tables is not None else None
        if table is not None:
            first_step = not outgoing.begun and computed >= self._block_tokens
            unwritten = self._written_by(output, request_id) if first_step else set()
            self._step.sends.append(self._plan_send(outgoing, list(table[0]), computed, scheduled, unwritten))

    def _written_by(self, output: SchedulerOutput, but: str) -> set[int]:
        """Blocks that this step writes for any request but this one."""
        tables = output.kv_connector_block_state
        assert tables is not None
        cached = output.scheduled_cached_reqs
        progress = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        progress.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        written: set[int] = set()
        for request_id, computed in progress.items():
            table = tables.get_block_ids(request_id) if request_id != but else None
            if table is not None:
                end = computed + output.num_scheduled_tokens[request_id]
                written.update(table[0][computed // self._block_tokens : -(-end // self._block_tokens)])
        return written

    # -- the end of a request -----------------------------------------------------------------------------

    def finish(self, request: Request, *, completed: bool) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. True pins its blocks: they are held for the receiver.

        Args:
            completed: it ran to its end; False when it was aborted or failed.
        """
        request_id = request.request_id
        incoming = self._incoming.pop(request_id, None)
        if incoming is not None and incoming.stage is not _Stage.OVER:
            # A load that is under way is still reported, once: the scheduler frees the blocks when it is.
            self._step.cancels.append(request_id)
        account = self._accounts.close(request_id)
        out = {ACCOUNT: account} if account is not None else None
        outgoing = self._outgoing.pop(request_id, None)
        raw = (request.kv_transfer_params or {}).get(SEND)
        if raw is None:
            return False, out
        slot, nonce = int(raw[0]), int(raw[1])
        board = self._board
        if outgoing is None or not completed or board.get(slot, Word.RELEASED) == nonce:
            if board.outcome(slot, nonce) is None:
                board.put(slot, Word.OUTCOME, nonce | Outcome.ABORTED)
            if outgoing is not None and outgoing.opened:
                board.add(Counter.HANDOFFS_ABORTED)
            self._step.ends.append((bytes(raw[2]), "lease_ended"))
            return False, out
        board.put(slot, Word.HELD, nonce)
        self._held[request_id] = _Held(slot, nonce, time.monotonic_ns() + int(self._lease_s * 1e9))
        self._step.holds.append(Hold(request_id, outgoing.handoff_id))
        return True, out

    def _end_leases(self) -> None:
        """Tell the ranks of leases that were released, or not renewed; while one is open vLLM keeps stepping."""
        now_ns = time.monotonic_ns()
        for request_id, held in self._held.items():
            if held.told:
                continue
            if self._board.get(held.slot, Word.RELEASED) == held.nonce:
                outcome = Outcome.RELEASED
            elif now_ns > max(held.until_ns, self._board.get(held.slot, Word.DEADLINE)):
                log.warning("lease_expired", request_id=request_id)
                outcome = Outcome.EXPIRED
            else:
                continue
            held.told = True
            self._step.over.append((request_id, outcome))

    def take_ended(self, ended: Mapping[str, Outcome]) -> None:
        """These leases have ended on some ranks; of different outcomes the worst counts."""
        for request_id, outcome in ended.items():
            held = self._held[request_id]
            held.outcome = max(held.outcome, outcome)

    def release(self, request_ids: set[str]) -> None:
        """These leases have ended on all ranks: their blocks are free from now on."""
        board = self._board
        for request_id in request_ids:
            held = self._held.pop(request_id)
            board.put(held.slot, Word.HELD, 0)
            board.put(held.slot, Word.OUTCOME, held.nonce | held.outcome)
            board.add(_ENDED[held.outcome])
