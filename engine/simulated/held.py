"""Prompts that this simulated worker hands over, and their leases on the board: opened, held, and how they ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.simulated.sending import Outgoing, SendingSide
from kv_transfer.board import Board, Counter, Outcome, Word

_POLL_S = 0.02
"""How often a lease is looked at: its owner does not wait for this."""
_COUNTERS = {
    Outcome.TAKEN: Counter.HANDOFFS_TAKEN,
    Outcome.RELEASED: Counter.HANDOFFS_RELEASED,
    Outcome.EXPIRED: Counter.HANDOFFS_EXPIRED,
    Outcome.NOT_CACHED: Counter.HANDOFFS_NOT_CACHED,
    Outcome.ABORTED: Counter.HANDOFFS_ABORTED,
}
_CODES = {Outcome.TAKEN: "", Outcome.NOT_CACHED: "not_cached"}


@dataclass(slots=True, eq=False)
class HeldPrompt:
    """A prompt under a lease."""

    request_id: str
    slot: int
    nonce: int
    outgoing: Outgoing
    held: bool = False
    opened: bool = False


class HeldPrompts:
    """All of them.

    Args:
        release: frees the blocks of a request whose lease has ended, or aborts it if it is not computed.
    """

    def __init__(self, board: Board, sending: SendingSide, release: Callable[[str], None]) -> None:
        self._board = board
        self._sending = sending
        self._release = release
        self._prompts: dict[str, HeldPrompt] = {}
        self._by_handoff: dict[bytes, HeldPrompt] = {}
        self._some = asyncio.Event()
        self._held = 0

    def add(self, request_id: str, lease: tuple[int, int], outgoing: Outgoing) -> HeldPrompt:
        prompt = HeldPrompt(request_id, *lease, outgoing)
        self._prompts[request_id] = self._by_handoff[outgoing.handoff_id] = prompt
        self._some.set()
        self._sending.expect(outgoing)
        return prompt

    def get(self, request_id: str) -> HeldPrompt | None:
        return self._prompts.get(request_id)

    def progress(self, prompt: HeldPrompt, ready_blocks: int, *, computed: bool) -> None:
        """See `SendingSide.progress`; a computed prompt is held from now on."""
        if not prompt.opened:
            prompt.opened = True
            self._board.add(Counter.HANDOFFS_OPENED)
        if computed and not prompt.held:
            prompt.held = True
            self._board.put(prompt.slot, Word.HELD, prompt.nonce)
            self._count(1)
        self._sending.progress(prompt.outgoing, ready_blocks, computed=computed)

    def taken(self, outgoing: Outgoing) -> None:
        """Its receiver has all it wants."""
        prompt = self._by_handoff.get(outgoing.handoff_id)
        if prompt is not None:
            self.end(prompt, Outcome.TAKEN)

    def end(self, prompt: HeldPrompt, outcome: Outcome) -> None:
        """The lease has ended; again is fine."""
        if self._prompts.pop(prompt.request_id, None) is None:
            return
        del self._by_handoff[prompt.outgoing.handoff_id]
        if self._board.outcome(prompt.slot, prompt.nonce) is None:
            self._board.put(prompt.slot, Word.OUTCOME, prompt.nonce | outcome)
        if prompt.held:
            self._count(-1)
        if prompt.opened or outcome is Outcome.NOT_CACHED:
            self._board.add(_COUNTERS[outcome])
        self._sending.end(prompt.outgoing, _CODES.get(outcome, "lease_ended"))
        self._release(prompt.request_id)

    async def watch(self) -> None:
        """End the leases whose owners gave them up or are gone. Runs until cancelled."""
        while True:
            self._some.clear()
            if not self._prompts:
                await self._some.wait()
            await asyncio.sleep(_POLL_S)
            now_ns = time.monotonic_ns()
            for prompt in tuple(self._prompts.values()):
                if self._board.get(prompt.slot, Word.RELEASED) == prompt.nonce:
                    self.end(prompt, Outcome.RELEASED if prompt.held else Outcome.ABORTED)
                elif prompt.held and self._board.get(prompt.slot, Word.DEADLINE) < now_ns:
                    self.end(prompt, Outcome.EXPIRED)

    def _count(self, change: int) -> None:
        self._held += change
        self._board.set_gauge(Counter.HANDOFFS_HELD, self._held)
