"""A handoff at a rank that sends it to one rank of the receiver, or to several that take a part of its heads each.

All of them have a copy of what the engine has published. It is taken when all have theirs; when one gives it up, none
can use it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kv_transfer import wire
from kv_transfer.extents import Extent
from kv_transfer.outbound import Outbound, Receiver

Part = Callable[[Outbound, Receiver], Outbound]
"""Makes what a receiver gets out of the whole."""


class Spread:
    """Its parts, as one.

    Args:
        whole: what the engine publishes; nobody receives it itself.
        part: makes what a receiver gets.
    """

    def __init__(self, whole: Outbound, part: Part) -> None:
        self.id = whole.id
        self._whole = whole
        self._part = part
        self._parts: dict[int, Outbound] = {}  # by the receiver's rank
        self._ranks = 0  # of the receiver
        self._taken: set[int] = set()

    # -- the engine's side --------------------------------------------------------------------------------

    def start(self, tokens: int, digest: int) -> None:
        for outbound in self._all():
            outbound.start(tokens, digest)

    def publish(self, generation: int, block_ids: list[int], extent: Extent) -> None:
        for outbound in self._all():
            outbound.publish(generation, block_ids, extent)

    def finish(self) -> None:
        for outbound in self._all():
            outbound.finish()

    def reset(self) -> None:
        for outbound in self._all():
            outbound.reset()

    def end(self, code: str, message: str) -> None:
        for outbound in self._all():
            outbound.end(code, message)

    def _all(self) -> Iterator[Outbound]:
        yield self._whole
        yield from self._parts.values()

    # -- the receiver's side ------------------------------------------------------------------------------

    def attach(self, receiver: Receiver) -> None:
        """A rank of the receiver opened this handoff; another receiver that had opened it before gives way.

        Raises:
            TransferError: `bad_token`: the handoff is not for this one.
        """
        receiver.check(self._whole.permit)  # before anybody gives way
        if receiver.ranks != self._ranks:
            for outbound in self._parts.values():
                outbound.end("bad_handoff", "another worker has opened this handoff")
            self._parts.clear()
            self._taken.clear()
            self._ranks = receiver.ranks
        part = self._parts.get(receiver.rank)
        if part is None:
            part = self._parts[receiver.rank] = self._part(self._whole, receiver)
        part.attach(receiver)

    def of(self, post: Callable[[wire.Message], None]) -> Outbound | None:
        """The part that goes to the receiver behind this connection."""
        return next((outbound for outbound in self._parts.values() if outbound.is_attached(post)), None)

    def taken(self, part: Outbound, wanted_by: int) -> bool:
        """A receiver has its part. True when all `wanted_by` ranks have theirs."""
        part.detach()
        self._taken.update(rank for rank, outbound in self._parts.items() if outbound is part)
        return len(self._taken) >= wanted_by

    def detach(self) -> None:
        for outbound in self._parts.values():
            outbound.detach()

    @property
    def ranks(self) -> int:
        """Of the receiver; 0: there is none yet."""
        return self._ranks
