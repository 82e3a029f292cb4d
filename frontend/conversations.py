"""What the dispatcher remembers of its requests, so that the next turn of a conversation costs less.

Joins the prefix memory with the workers' records, and turns what attempts report into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from frontend import write_back
from frontend.attempt import Attempt
from frontend.conversation_cache import ConversationCache, Holder, PrefixChain
from frontend.depths import Depths
from frontend.dispatch_metrics import WRITE_BACK_TOKENS, WRITE_BACKS, WRITE_BACKS_REFUSED
from frontend.known_caches import KnownCaches
from frontend.router import Ask, Fleet, Route
from frontend.write_back import WriteBack
from slipstream.v1.registry_pb2 import WorkerRecord


class Conversations:
    """The memory of one dispatcher; see `frontend.conversation_cache` for what it is worth.

    Args:
        caches: what workers tell of their blocks; what the others have is guessed from this frontend's requests.
        write_back: whether write-backs are planned; workers that know a prompt are preferred in any case.
    """

    def __init__(self, caches: KnownCaches, *, write_back: bool) -> None:
        self._caches = caches
        self._write_back = write_back
        self._cache = ConversationCache()
        self._slots: dict[Holder, int] = {}
        self._block_tokens: dict[str, set[int]] = {}

    def note_workers(self, records: Sequence[WorkerRecord], slots: Mapping[str, int]) -> None:
        """These are all workers there are, and their places in the router's vectors."""
        self._slots = {_holder(record): slots[record.worker_id] for record in records}
        self._caches.place(slots)
        self._block_tokens = {}
        for record in records:
            self._block_tokens.setdefault(record.model, set()).add(record.capacity.block_tokens)

    def begin(self, model: str, token_ids: Sequence[int], salt: str = "") -> PrefixChain:
        """The chain of a request. Stays empty where workers disagree on the block size: they cannot exchange any."""
        sizes = self._block_tokens.get(model, set()) - {0}
        chain = PrefixChain(model, next(iter(sizes)) if len(sizes) == 1 else 0, salt=salt)
        chain.extend(token_ids)
        return chain

    def known(self, chain: PrefixChain, slots: int) -> Depths | None:
        """By slot, the tokens from the beginning that a worker has; the last one is always computed. None: nobody has.

        Args:
            slots: places there are.
        """
        keys = chain.covering(chain.tokens - 1)
        blocks = self._caches.blocks_by_slot(keys, slots)
        guessed = {}
        for held, count in self._cache.blocks_known(keys).items():
            slot = self._slots.get(held)
            if slot is not None and not self._caches.tells_blocks(*held):
                guessed[slot] = count
        if guessed:
            blocks = Depths.of(guessed, slots) if blocks is None else blocks.with_(guessed)
        return None if blocks is None else blocks.times(chain.block_tokens)

    def resident_blocks(self, keys: Sequence[int]) -> int:
        """How many blocks of a chain, from the beginning, the worker has that has most of them."""
        told = max(self._caches.blocks(keys).values(), default=0)
        guessed = self._cache.blocks_known(keys)
        return max([told, *(count for held, count in guessed.items() if not self._caches.tells_blocks(*held))])

    def plan(self, ask: Ask, route: Route, fleet: Fleet) -> WriteBack | None:
        """What a decode worker should hand over to the route's prefill worker, if anything."""
        if not self._write_back or route.prefill is None:
            return None
        planned = write_back.plan(ask, route.prefill, fleet)
        if planned is not None:
            WRITE_BACKS.inc()
        return planned

    def note_computed(self, attempt: Attempt, chain: PrefixChain) -> None:
        """The attempt's prefill worker has computed the prompt."""
        worker, computed = attempt.route.prefill, attempt.computed
        assert worker is not None, "a route without a prefill worker computed"
        assert computed is not None, "called before the prompt was computed"
        self._remember(chain.covering(len(attempt.job.token_ids)), worker)
        asked = attempt.write_back
        if asked is None:
            return
        WRITE_BACK_TOKENS.inc(computed.received_tokens)
        if computed.received_tokens == 0 and computed.cached_tokens < asked.tokens:
            WRITE_BACKS_REFUSED.inc()
            self._forget(asked, computed.cached_tokens, chain)

    def note_answered(self, attempt: Attempt, chain: PrefixChain) -> None:
        """The attempt's decode worker has generated all that the chain holds."""
        # The last token was generated but has not gone through the model.
        self._remember(chain.covering(chain.tokens - 1), attempt.route.decode)

    def _remember(self, keys: Sequence[int], worker: WorkerRecord) -> None:
        if not self._caches.tells_blocks(*_holder(worker)):
            self._cache.remember(keys, _holder(worker))

    def _forget(self, asked: WriteBack, cached_tokens: int, chain: PrefixChain) -> None:
        kept = len(chain.covering(cached_tokens))
        self._cache.forget(chain.covering(asked.tokens)[kept:], _holder(asked.source))


def _holder(record: WorkerRecord) -> Holder:
    return record.worker_id, record.epoch
