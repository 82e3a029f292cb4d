"""How KV blocks travel in virtual time: what a sender sends goes one after the other, while the rest is computed."""

from __future__ import annotations

from collections.abc import Callable

from engine.simulated.request import Request
from simulator.event_loop import EventLoop
from simulator.underway import Underway
from simulator.worker import SimulatedWorker


class Transfers:
    """Of one cluster.

    Args:
        on_handed_over: called with the request, its attempt's id and the tokens once decode has a prompt's last block.
    """

    def __init__(
        self, loop: EventLoop, block_tokens: int, on_handed_over: Callable[[Underway, str, int], None]
    ) -> None:
        self._loop = loop
        self._block_tokens = block_tokens
        self._on_handed_over = on_handed_over

    def fetch(self, under: Underway, prefill: SimulatedWorker, request: Request) -> None:
        """The prompt's beginning comes from a worker that has it, as far as it still does."""
        source, now_s = under.source, self._loop.now_s
        assert source is not None, "prefill receives from a source only"
        source.catch_up()
        pool, profile = source.scheduler.pool, source.scheduler.profile
        blocks = pool.match(request.keys, under.source_tokens // self._block_tokens) if source.alive else []
        pool.hold(blocks)
        pool.give_back(blocks)  # used just now: they go last
        tokens = max(0, len(blocks) * self._block_tokens - request.done)
        moved_bytes = tokens // self._block_tokens * profile.block_bytes
        source.nic_free_s = max(now_s, source.nic_free_s) + moved_bytes / profile.transfer_bytes_per_s
        self._loop.at(source.nic_free_s + profile.transfer_latency_s, self._fetched, prefill, request, source, tokens)

    def _fetched(self, prefill: SimulatedWorker, request: Request, source: SimulatedWorker, tokens: int) -> None:
        prefill.received(request.request_id, tokens if source.alive else 0)

    def hand_over(self, under: Underway) -> None:
        """Once decode has blocks and the prompt is computed it is known when the last block will have come."""
        journey, prefill = under.journey, under.prefill
        if not under.receiving or journey.computed_s < 0 or prefill is None or under.received:
            return
        assert under.decode is not None
        under.received = True
        request = under.decode.scheduler.get(under.request_id)
        missing = under.prompt_tokens - (request.done if request is not None else 0)
        profile = prefill.scheduler.profile
        travel_s = missing / self._block_tokens * profile.block_bytes / profile.transfer_bytes_per_s
        # While the prompt was computed its blocks were under way already, as far as the others' left room for them.
        left_s = max(journey.begun_s, prefill.nic_free_s) + travel_s
        prefill.nic_free_s = max(prefill.nic_free_s, left_s)
        last_chunk_s = min(travel_s, profile.step_tokens / max(1, missing) * travel_s)
        here_s = max(left_s, self._loop.now_s + last_chunk_s) + profile.transfer_latency_s
        self._loop.at(here_s, self._on_handed_over, under, under.request_id, missing)
