"""What each request cost this engine, in prompt tokens and transfer; the sums are counted on the board."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kv_transfer.board import Board, Counter
from kv_transfer.door import REFUSALS
from slipstream import telemetry

log = telemetry.get_logger(__name__)

BYTES_BY_WAY = {
    "shm/direct": Counter.BYTES_SHM_DIRECT,
    "shm/staged": Counter.BYTES_SHM_STAGED,
    "ucx": Counter.BYTES_UCX,
    "nixl": Counter.BYTES_NIXL,
}
FAILURES = {
    "worker_gone": Counter.FAILED_WORKER_GONE,
    "timeout": Counter.FAILED_TIMEOUT,
    "lease_ended": Counter.FAILED_LEASE_ENDED,
    "digest": Counter.FAILED_DIGEST,
    "no_path": Counter.FAILED_NO_PATH,
    "cancelled": Counter.FAILED_CANCELLED,
    "not_registered": Counter.FAILED_NOT_REGISTERED,
    "bad_identity": Counter.FAILED_BAD_IDENTITY,
    "bad_token": Counter.FAILED_BAD_TOKEN,
}
REFUSED = {why: Counter[f"REFUSED_{why.upper()}"] for why in REFUSALS}


@dataclass(slots=True)
class TransferReport:
    """How one handoff went at its receiver; `failure` is an error code, empty when it went well.

    Attributes:
        seconds: spent in digesting, sending, copying and checking. exposed_s: see `inbound.Tally`.
        resent: spans that did not fit their digest.
    """

    blocks: int = 0
    bytes_moved: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    exposed_s: float = 0.0
    resent: int = 0
    path: str = ""
    failure: str = ""


@dataclass(slots=True)
class _Account:
    prompt_tokens: int
    computed_tokens: int = 0
    cached_tokens: int = 0
    received_tokens: int = 0
    report: TransferReport = field(default_factory=TransferReport)
    counted: bool = False

    def to_dict(self) -> dict[str, Any]:
        report = self.report
        return {
            "prompt_tokens": self.prompt_tokens,
            "computed_tokens": self.computed_tokens,
            "cached_tokens": self.cached_tokens,
            "received_tokens": self.received_tokens,
            "blocks_moved": report.blocks,
            "bytes_moved": report.bytes_moved,
            "wire_bytes": report.wire_bytes,
            "transfer_s": report.seconds,
            "exposed_s": report.exposed_s,
            "resent": report.resent,
            "transport": report.path,
            "failure": report.failure,
        }


class Accounts:
    """One account for each request in the engine."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._open: dict[str, _Account] = {}

    def open(self, request_id: str, prompt_tokens: int) -> _Account:
        """The request's account; a new one unless there is one."""
        account = self._open.get(request_id)
        if account is None:
            account = self._open[request_id] = _Account(prompt_tokens)
        return account

    def first_step(self, request_id: str, prompt_tokens: int, computed: int, scheduled: int) -> None:
        """A request is scheduled for the first time; `computed` tokens are in its blocks already."""
        account = self.open(request_id, prompt_tokens)
        if account.report.failure:  # only now: a request that was abandoned meanwhile has recomputed nothing
            account.counted = True
            self._board.add(FAILURES.get(account.report.failure, Counter.FAILED_OTHER))
            log.warning("transfer_failed", request_id=request_id, code=account.report.failure)
        account.cached_tokens = max(0, computed - account.received_tokens)
        self._board.add(Counter.PROMPT_TOKENS_CACHED, account.cached_tokens)
        self._count(account, computed, scheduled)

    def next_step(self, request_id: str, computed: int, scheduled: int) -> None:
        account = self._open.get(request_id)
        if account is not None and computed < account.prompt_tokens:
            self._count(account, computed, scheduled)

    def _count(self, account: _Account, computed: int, scheduled: int) -> None:
        tokens = min(account.prompt_tokens, computed + scheduled) - computed
        account.computed_tokens += tokens
        self._board.add(Counter.PROMPT_TOKENS_COMPUTED, tokens)

    def expect(self, request_id: str, prompt_tokens: int, tokens: int) -> None:
        """These tokens are being received."""
        self.open(request_id, prompt_tokens).received_tokens = tokens

    def book(self, request_id: str, report: TransferReport) -> None:
        """A handoff has ended. A failure counts once the request goes on without it; else it was cancelled."""
        board = self._board
        account = self._open.get(request_id)
        if account is not None:
            account.report = report
        board.add(Counter.SPANS_RESENT, report.resent)
        if report.failure:
            if account is not None:
                account.received_tokens = 0
            else:
                board.add(Counter.FAILED_CANCELLED)
            return
        board.add(Counter.TRANSFERS_DONE)
        board.add(Counter.BLOCKS_RECEIVED, report.blocks)
        board.add(Counter.BYTES_RECEIVED, report.bytes_moved)
        board.add(Counter.WIRE_BYTES, report.wire_bytes)
        board.add(Counter.TRANSFER_NS, int(report.seconds * 1e9))
        board.add(Counter.EXPOSED_NS, int(report.exposed_s * 1e9))
        # Of each transfer by itself: the wait of one, which may be longer than its work, hides nothing of another.
        board.add(Counter.HIDDEN_NS, int(max(0.0, report.seconds - report.exposed_s) * 1e9))
        board.add(next(word for way, word in BYTES_BY_WAY.items() if report.path.startswith(way)), report.bytes_moved)
        if account is not None:
            board.add(Counter.PROMPT_TOKENS_RECEIVED, account.received_tokens)

    def close(self, request_id: str) -> dict[str, Any] | None:
        """The account of a request that has ended; None when it never got one."""
        account = self._open.pop(request_id, None)
        if account is None:
            return None
        if account.report.failure and not account.counted:
            self._board.add(Counter.FAILED_CANCELLED)
        return account.to_dict()
