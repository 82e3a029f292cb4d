"""The half of the connector that lives in vLLM's worker: tells the agent what each step does, and ends leases.

Of an engine with tensor-parallel ranks each has one, for its part of every block; what they find is put together in
`scheduler_side`.

Every engine step passes through here, also empty ones; while something is outstanding vLLM keeps stepping. In an empty
step this waits a moment for news from the agent, so that an engine that only waits uses little of its core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kv_transfer.accounts import TransferReport
from kv_transfer.agent import TransferAgent
from kv_transfer.board import Outcome
from kv_transfer.exchange import Received, Started, Taken
from kv_transfer.extents import Extent
from kv_transfer.inbound import Want
from kv_transfer.scheduler_side import Hold, Send, Step

if TYPE_CHECKING:
    from kv_transfer.kv_memory import KvMemory

# How long an empty step waits for news: what a new request may wait for the engine, beside its prompt's computation.
_EMPTY_STEP_S = 0.004


@dataclass(slots=True)
class Results:
    """What has happened since the last step, by request id.

    Attributes:
        ended: leases, and how.
        started: (tokens, digest) of handoffs that senders have begun to compute.
        reports: of transfers that have ended; those that had blocks are in `received` too.
    """

    ended: dict[str, Outcome] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    started: dict[str, tuple[int, int]] = field(default_factory=dict)
    reports: dict[str, TransferReport] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.ended or self.received or self.started or self.reports)


class WorkerSide:
    """The transfers and leases of one engine, or of one of its ranks.

    Args:
        regions: of each layer by name: (first region, end).
        by_layer: whether a layer's blocks are in memory when its hook is called; else all are published after the step.
    """

    def __init__(
        self,
        agent: TransferAgent,
        memory: KvMemory,
        *,
        regions: Mapping[str, tuple[int, int]],
        by_layer: bool,
    ) -> None:
        self._agent = agent
        self._memory = memory
        self._regions = regions
        self._all_regions = len(memory.regions)
        self.by_layer = by_layer
        self._opened: set[str] = set()
        self._loading: set[str] = set()
        self._unstarted: list[str] = []  # loads of handoffs that had failed before
        self._holding: dict[str, Hold] = {}
        self._over: dict[str, Outcome] = {}  # of what is held
        self._sent: set[bytes] = set()  # handoffs that have begun here and are not over
        self._taken: dict[bytes, str] = {}
        self._sending: list[Send] = []
        self._tokens = 0

    # -- a step, in order ---------------------------------------------------------------------------------

    def begin(self, step: Step) -> None:
        """Before the forward pass: nothing that this step overwrites may be sent any more."""
        agent = self._agent
        agent.reset(step.resets)
        for permit in step.expects:
            agent.expect(permit)
        for handoff_id, why in step.ends:
            self._forget(handoff_id)
            agent.end(handoff_id, why, "the sender has given the prompt up")
        for send in step.sends:
            if send.begin is not None:
                self._sent.add(send.handoff_id)
                agent.begin(send.handoff_id, *send.begin)
                self._publish(send, 0, send.ready, 0, self._all_regions)
        self._sending = step.sends
        self._tokens = step.tokens
        for request_id, handoff in step.opens:
            self._opened.add(request_id)
            agent.open(request_id, handoff)
        for load in step.loads:
            if load.request_id in self._opened:
                self._loading.add(load.request_id)
                agent.receive(load.request_id, Want(load.first, load.targets))
            else:
                self._unstarted.append(load.request_id)
        for request_id in step.cancels:
            if request_id in self._opened:
                agent.cancel(request_id)
        for hold in step.holds:
            self._holding[hold.request_id] = hold
        # What is not held any more was taken before the news came.
        self._over |= {request_id: outcome for request_id, outcome in step.over if request_id in self._holding}

    def layer_done(self, layer: str) -> None:
        """This layer's KV of all tokens of the step is in memory."""
        if self._sending and self.by_layer:
            region, region_end = self._regions[layer]
            for send in self._sending:
                self._publish(send, send.first, send.end, region, region_end)

    def forward_done(self) -> None:
        """After the forward pass."""
        for send in self._sending:
            if not self.by_layer:
                self._publish(send, send.first, send.end, 0, self._all_regions)
            if send.final:
                self._agent.computed(send.handoff_id)
        self._sending = []

    def _publish(self, send: Send, first: int, end: int, region: int, region_end: int) -> None:
        extent = Extent(first, end, region, region_end)
        if extent.pieces:
            self._agent.publish(send.handoff_id, send.block_ids, extent)

    def poll(self) -> Results:
        """What has happened; an empty step waits a moment for it."""
        results = self._look()
        outstanding = self._opened or self._holding
        if results.empty and outstanding and self._tokens == 0:
            self._agent.news.wait(_EMPTY_STEP_S)
            results = self._look()
        return results

    def _look(self) -> Results:
        results = Results()
        for event in self._agent.take_events():
            match event:
                case Started(request_id, tokens, digest):
                    results.started[request_id] = (tokens, digest)
                case Received():
                    self._ended(event, results)
                case Taken(handoff_id, refused) if handoff_id in self._sent:
                    self._taken[handoff_id] = refused
                case Taken():
                    pass  # on its way while the handoff was ended here
        for request_id in self._unstarted:
            results.received.add(request_id)
            results.failed.add(request_id)
        self._unstarted.clear()
        self._end_holds(results)
        return results

    def _ended(self, event: Received, results: Results) -> None:
        request_id, tally = event.request_id, event.tally
        self._opened.discard(request_id)
        results.reports[request_id] = TransferReport(
            blocks=tally.blocks,
            bytes_moved=tally.blocks * self._memory.block_bytes,
            wire_bytes=tally.wire_bytes,
            seconds=tally.busy_s,
            exposed_s=tally.exposed_s,
            resent=tally.again,
            path=tally.way,
            failure=event.error.code if event.error is not None else "",
        )
        if request_id in self._loading:
            self._loading.discard(request_id)
            results.received.add(request_id)
            if event.error is not None:
                results.failed.add(request_id)

    # -- leases -------------------------------------------------------------------------------------------

    def _end_holds(self, results: Results) -> None:
        for request_id, hold in list(self._holding.items()):
            outcome = self._outcome(hold)
            if outcome is not None:
                del self._holding[request_id]
                self._over.pop(request_id, None)
                self._forget(hold.handoff_id)
                why = f"the lease on the blocks has ended: {outcome.name.lower()}"
                self._agent.end(hold.handoff_id, "lease_ended", why)
                results.ended[request_id] = outcome

    def _outcome(self, hold: Hold) -> Outcome | None:
        refused = self._taken.get(hold.handoff_id)
        if refused is not None:
            return Outcome.RELEASED if refused else Outcome.TAKEN
        return self._over.get(hold.request_id)

    def _forget(self, handoff_id: bytes) -> None:
        self._sent.discard(handoff_id)
        self._taken.pop(handoff_id, None)

    def shutdown(self) -> None:
        """End all transfers."""
        self._agent.stop()


def regions_by_layer(names: Iterable[str], regions: int) -> dict[str, tuple[int, int]]:
    """Which regions each layer has: one, or two where K and V are apart; `names` in the order of `block_views`."""
    ordered = list(names)
    each = regions // max(1, len(ordered))
    return {name: (number * each, (number + 1) * each) for number, name in enumerate(ordered)}
