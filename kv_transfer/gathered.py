"""A handoff at a rank that receives it from one rank of the sender, or from several that have a part of its heads each.

It has begun when it has begun at all of them, it is here when all parts are, and it has failed when one has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kv_transfer.inbound import Inbound, Tally, Want
from slipstream.errors import TransferError


class Gathered:
    """Its parts, as one.

    Args:
        parts: how many there are.
        on_started: called once with (tokens, digest). on_end: called once with None, or with the first error.
    """

    def __init__(
        self,
        parts: int,
        on_started: Callable[[int, int], None],
        on_end: Callable[[TransferError | None], None],
    ) -> None:
        self._left = parts
        self._unstarted = parts
        self._on_started = on_started
        self._on_end = on_end
        self._inbounds: list[tuple[Inbound, bool]] = []
        self._begun: set[tuple[int, int]] = set()
        self._error: TransferError | None = None

    def add(self, inbound: Inbound, *, wanted: bool) -> None:
        """One of the parts. What is not wanted comes from another rank of the sender: this one is only told so."""
        self._inbounds.append((inbound, wanted))

    @property
    def inbounds(self) -> Sequence[Inbound]:
        return [inbound for inbound, _ in self._inbounds]

    def started(self, tokens: int, digest: int) -> None:
        """A part has begun."""
        self._begun.add((tokens, digest))
        self._unstarted -= 1
        if len(self._begun) > 1:
            error = TransferError("the sender's ranks compute different prompts", code="bad_handoff")
            for inbound in self.inbounds:
                inbound.failed(error)
        elif self._unstarted == 0:
            self._on_started(tokens, digest)

    def receive(self, want: Want) -> None:
        for inbound, wanted in self._inbounds:
            inbound.receive(want if wanted else Want(want.first, ()))

    def cancel(self) -> None:
        for inbound in self.inbounds:
            inbound.cancel()

    def ended(self, error: TransferError | None) -> None:
        """A part has ended; what is there of the others is of no use when it has failed."""
        self._left -= 1
        last = self._left == 0  # asked now: what is cancelled may end at once
        if error is not None and self._error is None:
            self._error = error
            self.cancel()
        if last:
            self._on_end(self._error)

    @property
    def tally(self) -> Tally:
        """Of all parts together."""
        tallies = [inbound.tally for inbound in self.inbounds]
        return Tally(
            blocks=max(one.blocks for one in tallies),
            wire_bytes=sum(one.wire_bytes for one in tallies),
            busy_s=sum(one.busy_s for one in tallies),
            exposed_s=max(one.exposed_s for one in tallies),
            again=sum(one.again for one in tallies),
            way=next((one.way for one in tallies if one.way), ""),
        )
