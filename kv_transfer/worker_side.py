"""The half of the connector that lives in vLLM's worker: runs the transfers and watches the leases.

Every engine step passes through here, also empty ones; while something is outstanding vLLM keeps stepping with
pauses of a millisecond. Received blocks are copied on a few transfer threads, so a step never waits for them; only the
staging of a copy for a decode worker that cannot read memory directly happens in the step itself.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kv_transfer import layout as layouts
from kv_transfer.board import Board, Counter, Outcome, Word
from kv_transfer.layout import Layout
from kv_transfer.memory import allow_readers
from kv_transfer.scheduler_side import Hold, Load, TransferReport
from kv_transfer.shm import Mode, Receiver, Stager
from slipstream import telemetry
from slipstream.errors import TransferError

if TYPE_CHECKING:
    import torch

log = telemetry.get_logger(__name__)

# More than one, so that a transfer that waits for a slow peer does not hold up the others.
_TRANSFER_THREADS = 4
_COUNTERS = {
    Outcome.TAKEN: Counter.HANDOFFS_TAKEN,
    Outcome.RELEASED: Counter.HANDOFFS_RELEASED,
    Outcome.EXPIRED: Counter.HANDOFFS_EXPIRED,
}


@dataclass(slots=True)
class Results:
    """What has ended since the last step, by request id."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    reports: dict[str, TransferReport] = field(default_factory=dict)


class WorkerSide:
    """The transfers and leases of one engine.

    Args:
        facts: what must agree between two workers for their blocks to be exchangeable, beside the shapes.
    """

    def __init__(
        self,
        board: Board,
        *,
        blocks: int,
        block_tokens: int,
        facts: Mapping[str, object],
        mode: Mode,
        timeout_s: float,
    ) -> None:
        self._board = board
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._facts = dict(facts)
        self._mode: Mode = mode
        self._timeout_s = timeout_s
        self._probe = ctypes.c_uint64(board.epoch)  # read by decode workers: see Layout.probe_address
        self._threads = ThreadPoolExecutor(_TRANSFER_THREADS, thread_name_prefix="kv-transfer")
        self._receiver: Receiver | None = None
        self._stager: Stager | None = None
        self._loading: dict[str, Future[TransferReport]] = {}
        self._holding: dict[str, Hold] = {}
        self._staging: dict[str, Future[bool]] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learn where the KV memory is, and publish it to the workers of this host."""
        views = layouts.block_views(kv_caches, self._blocks)
        self._facts["views"] = [view.shape[1] for view in views]
        layout = Layout(
            fingerprint=layouts.fingerprint(self._facts),
            pid=os.getpid(),
            epoch=self._board.epoch,
            probe_address=ctypes.addressof(self._probe),
            direct=all(view.device.type == "cpu" for view in views),
            blocks=self._blocks,
            block_tokens=self._block_tokens,
            regions=layouts.regions_of(views),
        )
        allow_readers()
        self._receiver = Receiver(self._board.path.parent, layout, views, mode=self._mode, timeout_s=self._timeout_s)
        self._stager = Stager(self._board, views)
        self._board.set_gauge(Counter.BLOCK_TOKENS, self._block_tokens)
        self._board.set_gauge(Counter.BLOCK_BYTES, layout.block_bytes)
        self._board.publish_layout(layouts.encode(layout))

    def start(self, loads: list[Load], holds: list[Hold]) -> None:
        """Begin these transfers, and watch these leases from now on."""
        for load in loads:
            self._loading[load.request_id] = self._threads.submit(self._load, load)
        for hold in holds:
            self._holding[hold.request_id] = hold

    def poll(self) -> Results:
        """What has ended; never waits."""
        results = Results()
        for request_id in [rid for rid, future in self._loading.items() if future.done()]:
            report = self._loading.pop(request_id).result()
            results.reports[request_id] = report
            results.received.add(request_id)
            if report.failure:
                results.failed.add(request_id)
        now_ns = time.monotonic_ns()
        for request_id, hold in list(self._holding.items()):
            outcome = self._outcome(hold, now_ns)
            if outcome is not None and self._is_staged(request_id):
                self._end(hold, outcome)
                del self._holding[request_id]
                results.sent.add(request_id)
        return results

    def _is_staged(self, request_id: str) -> bool:
        """No thread is reading this request's blocks (any more)."""
        staging = self._staging.get(request_id)
        if staging is not None and not staging.done():
            return False
        self._staging.pop(request_id, None)
        return True

    def shutdown(self) -> None:
        """Stop the transfer threads; a running copy ends first, waiting ones are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._receiver is not None:
            self._receiver.close()

    def _load(self, load: Load) -> TransferReport:
        assert self._receiver is not None, "register() comes before the first step"
        try:
            received = self._receiver.receive(load.handoff, load.first, load.targets)
        except TransferError as error:
            log.warning("transfer_error", request_id=load.request_id, code=error.code, error=error.message)
            return TransferReport(failure=error.code)
        except Exception:  # an unforeseen failure must still end the wait: the prompt is computed here
            log.exception("transfer_crashed", request_id=load.request_id)
            return TransferReport(failure="internal_error")
        return TransferReport(received.blocks, received.bytes_moved, received.seconds, received.path)

    def _outcome(self, hold: Hold, now_ns: int) -> Outcome | None:
        board, slot, nonce = self._board, hold.slot, hold.nonce
        if board.get(slot, Word.TAKEN) == nonce:
            return Outcome.TAKEN
        if board.get(slot, Word.RELEASED) == nonce:
            return Outcome.RELEASED
        if now_ns > max(hold.until_ns, board.get(slot, Word.DEADLINE)):
            log.warning("lease_expired", request_id=hold.request_id)
            return Outcome.EXPIRED
        return self._stage_if_asked(hold)

    def _stage_if_asked(self, hold: Hold) -> Outcome | None:
        """Copy in a transfer thread: a step of the engine does not wait for it."""
        assert self._stager is not None
        staging = self._staging.get(hold.request_id)
        if staging is None:
            if self._board.get(hold.slot, Word.ASKED) == hold.nonce:
                self._staging[hold.request_id] = self._threads.submit(self._stage, hold, self._stager)
        elif staging.done() and not staging.result():
            log.warning("staging_failed", request_id=hold.request_id, remedy="is /dev/shm full?")
            return Outcome.RELEASED
        return None

    def _stage(self, hold: Hold, stager: Stager) -> bool:
        try:
            return stager.serve(hold.slot, hold.nonce, hold.block_ids)
        except Exception:  # an unforeseen failure must still end the lease: decode computes the prompt
            log.exception("staging_crashed", request_id=hold.request_id)
            return False

    def _end(self, hold: Hold, outcome: Outcome) -> None:
        board = self._board
        board.put(hold.slot, Word.HELD, 0)  # before the blocks can be reused: readers look at this last
        if board.get(hold.slot, Word.ASKED) == hold.nonce and self._stager is not None:
            self._stager.drop(hold.slot)
        board.put(hold.slot, Word.OUTCOME, hold.nonce | outcome)
        board.add(_COUNTERS[outcome])
