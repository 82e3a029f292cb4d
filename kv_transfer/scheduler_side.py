"""The half of the connector that lives in vLLM's scheduler: decides what is received and held, and counts.

Decode: a request that brings a handoff waits (WAITING_FOR_REMOTE_KVS) while the blocks missing from the local
prefix cache are received. The last prompt token is never received: decode computes it to sample the first
token. A request asks once; after a failure, or a preemption, it computes its prompt here.

Prefill: when a request that brings a lease has finished its prompt, its blocks are pinned and described in a
handoff, which leaves the engine with the request's last output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kv_transfer import handoff as handoffs
from kv_transfer.board import Board, Counter, Outcome, Word
from kv_transfer.handoff import Handoff
from slipstream import telemetry
from slipstream.errors import TransferError

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = telemetry.get_logger(__name__)

# Keys of a request's `kv_transfer_params`, in and out.
SEND = "slipstream_send"  # in, prefill: (slot, nonce) of the lease
RECEIVE = "slipstream_receive"  # in, decode: the encoded handoff
HANDOFF = "slipstream_handoff"  # out, prefill: the encoded handoff
ACCOUNT = "slipstream_account"  # out, both: Account as a dict


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks to receive: those of the handoff from index `first` on, into `targets`."""

    request_id: str
    handoff: Handoff
    first: int
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Hold:
    """Blocks to keep until the lease ends, and in any case until `until_ns` (CLOCK_MONOTONIC)."""

    request_id: str
    slot: int
    nonce: int
    block_ids: list[int]
    until_ns: int


@dataclass(slots=True)
class TransferReport:
    """How one load went; `failure` is an error code, empty when it went well."""

    blocks: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
    path: str = ""
    failure: str = ""


@dataclass(slots=True)
class Account:
    """What one request cost this engine, in prompt tokens and transfer."""

    prompt_tokens: int
    computed_tokens: int = 0
    cached_tokens: int = 0
    received_tokens: int = 0
    report: TransferReport = field(default_factory=TransferReport)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "computed_tokens": self.computed_tokens,
            "cached_tokens": self.cached_tokens,
            "received_tokens": self.received_tokens,
            "blocks_moved": self.report.blocks,
            "bytes_moved": self.report.bytes_moved,
            "transfer_s": self.report.seconds,
            "transport": self.report.path,
            "failure": self.report.failure,
        }


class SchedulerSide:
    """State of all requests in the engine that transfer something."""

    def __init__(self, board: Board, *, block_tokens: int, lease_s: float) -> None:
        self._board = board
        self._block_tokens = block_tokens
        self._lease_s = lease_s
        self._pool: BlockPool | None = None
        self._accounts: dict[str, Account] = {}
        self._handoffs: dict[str, Handoff | None] = {}  # None: looked at, and not (or no longer) usable
        self._loads: list[Load] = []
        self._holds: list[Hold] = []
        self._held = 0

    def bind_pool(self, pool: BlockPool) -> None:
        self._pool = pool
        # One block is vLLM's placeholder; nobody can have it.
        self._board.set_gauge(Counter.BLOCKS_TOTAL, pool.num_gpu_blocks - 1)
        self.publish_gauges()

    def publish_gauges(self) -> None:
        if self._pool is not None:
            self._board.set_gauge(Counter.BLOCKS_FREE, self._pool.get_num_free_blocks())
        self._board.set_gauge(Counter.HANDOFFS_HELD, self._held)

    # -- decode -------------------------------------------------------------------------------------------

    def receivable_tokens(self, request: Request, local_tokens: int) -> int:
        """Prompt tokens to receive beyond the `local_tokens` that the prefix cache has; 0: compute them here."""
        handoff = self._handoff_of(request)
        if handoff is None:
            return 0
        # At least one prompt token has to be computed, to sample from.
        return max(0, min(handoff.tokens, int(request.num_tokens) - 1) - local_tokens)

    def start_load(self, request: Request, block_ids: Sequence[int], tokens: int) -> None:
        """Receive `tokens` tokens that end the first `receivable` ones, into this request's blocks."""
        handoff = self._handoffs.get(request.request_id)
        if handoff is None:
            return
        self._handoffs[request.request_id] = None  # once only
        last = min(handoff.tokens, request.num_tokens - 1)
        first = (last - tokens) // self._block_tokens
        count = -(-last // self._block_tokens) - first
        self._loads.append(Load(request.request_id, handoff, first, list(block_ids[first : first + count])))
        account = self._account_of(request.request_id, request.num_prompt_tokens)
        account.received_tokens = tokens

    def _handoff_of(self, request: Request) -> Handoff | None:
        request_id = request.request_id
        if request_id in self._handoffs:
            return self._handoffs[request_id]
        params = request.kv_transfer_params or {}
        raw = params.get(RECEIVE)
        if raw is None:
            return None
        handoff: Handoff | None = None
        try:
            handoff = handoffs.decode(raw)
            prompt = request.prompt_token_ids or []
            if handoffs.digest_tokens(prompt[: handoff.tokens]) != handoff.digest:
                raise TransferError("handoff was made for another prompt", code="bad_handoff")
        except TransferError as error:
            handoff = None
            self._failed(request_id, request.num_prompt_tokens, error.code)
            log.warning("handoff_refused", request_id=request_id, code=error.code, error=error.message)
        self._handoffs[request_id] = handoff
        return handoff

    def _failed(self, request_id: str, prompt_tokens: int, code: str) -> None:
        self._account_of(request_id, prompt_tokens).report = TransferReport(failure=code)
        self._board.add(Counter.TRANSFERS_FAILED)

    def take_reports(self, reports: dict[str, TransferReport]) -> None:
        """Book finished transfers; called before the scheduler acts on them."""
        board = self._board
        for request_id, report in reports.items():
            account = self._accounts.get(request_id)
            if account is not None:
                account.report = report
            if report.failure:
                board.add(Counter.TRANSFERS_FAILED)
                if account is not None:
                    account.received_tokens = 0
                log.warning("transfer_failed", request_id=request_id, code=report.failure)
                continue
            board.add(Counter.TRANSFERS_DONE)
            board.add(Counter.BLOCKS_RECEIVED, report.blocks)
            board.add(Counter.BYTES_RECEIVED, report.bytes_moved)
            board.add(Counter.TRANSFER_NS, int(report.seconds * 1e9))
            if account is not None:
                board.add(Counter.PROMPT_TOKENS_RECEIVED, account.received_tokens)
            if report.path.endswith("staged"):
                board.add(Counter.TRANSFERS_STAGED)

    # -- every step ---------------------------------------------------------------------------------------

    def take_step(self, output: SchedulerOutput) -> tuple[list[Load], list[Hold]]:
        """Count the prompt tokens of this step; hand over the loads and holds decided since the last one."""
        for new in output.scheduled_new_reqs:
            prompt_tokens = len(new.prompt_token_ids or ())
            account = self._account_of(new.req_id, prompt_tokens)
            account.cached_tokens = max(0, new.num_computed_tokens - account.received_tokens)
            self._board.add(Counter.PROMPT_TOKENS_CACHED, account.cached_tokens)
            self._count(account, new.num_computed_tokens, output.num_scheduled_tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            known = self._accounts.get(request_id)
            if known is not None and computed < known.prompt_tokens:
                self._count(known, computed, output.num_scheduled_tokens[request_id])
        self.publish_gauges()
        loads, holds = self._loads, self._holds
        self._loads, self._holds = [], []
        return loads, holds

    def _count(self, account: Account, computed: int, scheduled: int) -> None:
        tokens = min(account.prompt_tokens, computed + scheduled) - computed
        account.computed_tokens += tokens
        self._board.add(Counter.PROMPT_TOKENS_COMPUTED, tokens)

    def _account_of(self, request_id: str, prompt_tokens: int) -> Account:
        account = self._accounts.get(request_id)
        if account is None:
            account = self._accounts[request_id] = Account(prompt_tokens)
        return account

    # -- the end of a request -----------------------------------------------------------------------------

    def finish(self, request: Request, block_ids: list[int], *, completed: bool) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. True pins its blocks: they are held for a decode worker.

        Args:
            completed: it ran to its end; False when it was aborted or failed.
        """
        request_id = request.request_id
        self._handoffs.pop(request_id, None)
        # A load decided in this very step, for a request that ended before the step ran, is still handed to the
        # worker: the scheduler waits for its report before it frees the blocks.
        account = self._accounts.pop(request_id, None)
        out: dict[str, Any] = {ACCOUNT: account.to_dict()} if account is not None else {}
        lease = (request.kv_transfer_params or {}).get(SEND)
        if lease is None:
            return False, out or None
        slot, nonce = int(lease[0]), int(lease[1])
        board = self._board
        if not completed or board.get(slot, Word.RELEASED) == nonce:
            board.put(slot, Word.OUTCOME, nonce | Outcome.ABORTED)
            return False, out or None
        out[HANDOFF] = handoffs.encode(
            Handoff(
                version=handoffs.VERSION,
                board=board.path.name,
                epoch=board.epoch,
                slot=slot,
                nonce=nonce,
                tokens=request.num_prompt_tokens,
                digest=handoffs.digest_tokens(request.prompt_token_ids or []),
                block_ids=block_ids,
            )
        )
        board.put(slot, Word.HELD, nonce)
        board.add(Counter.HANDOFFS_OPENED)
        self._held += 1
        until_ns = time.monotonic_ns() + int(self._lease_s * 1e9)
        self._holds.append(Hold(request_id, slot, nonce, block_ids, until_ns))
        return True, out

    def release(self, request_ids: set[str]) -> None:
        """The worker side has ended these leases."""
        self._held -= len(request_ids)
