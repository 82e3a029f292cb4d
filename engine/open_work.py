"""What a worker has before it, counted from the moment its service accepts a request.

An engine's own figures are those of its last step, and leave out what is on its way there. Here every open request is
known with its prompt: how much of it is yet to be computed is read off the prefix cache, block by block, whichever
engine it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from slipstream import block_keys
from slipstream.v1.registry_pb2 import Load

FRONTENDS_S = 5.0
"""How long a frontend counts that has nothing open: those that use the worker share it, and should not forget each
other between two requests."""


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request between its acceptance and its end.

    Attributes:
        prompt_tokens: 0 when nothing of the prompt is to be computed here: its blocks come, or are there.
        context_tokens: of its sequence, on a worker that generates.
    """

    work: OpenWork
    frontend_id: str
    prompt_tokens: int
    context_tokens: int
    keys: Sequence[int]
    busy: bool = True
    _blocks_done: int = field(default=0, init=False)

    def computed(self) -> None:
        """The prompt is computed, and the engine has no more to do for this request than to hold its blocks."""
        self.prompt_tokens, self.busy = 0, False
        self.work.changed()

    def generated(self, tokens: int) -> None:
        """So many tokens came; with the first ones the prompt is computed."""
        self.context_tokens += tokens
        if self.prompt_tokens:
            self.prompt_tokens = 0
            self.work.changed()

    def left_tokens(self, blocks: Container[int], block_tokens: int) -> int:
        """Tokens of the prompt that are yet to be computed; the last one always is."""
        if self.prompt_tokens == 0:
            return 0
        while self._blocks_done < len(self.keys) and self.keys[self._blocks_done] in blocks:
            self._blocks_done += 1
        return max(1, self.prompt_tokens - self._blocks_done * block_tokens)


class OpenWork:
    """All open requests of a worker.

    Attributes:
        changed: called when a request comes, goes, or has its prompt computed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_s: dict[str, float] = {}  # by frontend
        self.changed: Callable[[], None] = lambda: None
        self._open: set[OpenRequest] = set()
        self._blocks: Container[int] = ()
        self._block_tokens = 0
        self._model = ""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def busy(self) -> int:
        """Requests for which the engine has something to do."""
        return sum(one.busy for one in self._open)

    def know(self, model: str, block_tokens: int, blocks: Container[int]) -> None:
        """From now on the prefix cache is known: `blocks` holds the keys of what is in it, and is kept up to date."""
        self._blocks, self._block_tokens = blocks, block_tokens
        self._model = model

    @contextmanager
    def begun(
        self,
        frontend_id: str,
        token_ids: Sequence[int],
        *,
        computes: bool,
        generates: bool,
        cache_salt: str = "",
    ) -> Iterator[OpenRequest]:
        """A request, while the block runs.

        Args:
            computes: whether its prompt is to be computed here.
            generates: whether tokens are generated here.
            cache_salt: of the part of the prefix cache that it shares.
        """
        keys: Sequence[int] = ()
        if computes and self._block_tokens:
            root = block_keys.root_key(self._model, self._block_tokens, cache_salt)
            keys = block_keys.extend(root, token_ids, self._block_tokens)
        request = OpenRequest(
            self, frontend_id, len(token_ids) if computes else 0, len(token_ids) if generates else 0, keys
        )
        self._open.add(request)
        self._heard_s[frontend_id] = self._clock()
        self.changed()
        try:
            yield request
        finally:
            self._open.discard(request)
            self._heard_s[frontend_id] = self._clock()
            self.changed()

    def load(self, engine: Load, *, of: str | None = None) -> Load:
        """An engine's figures, with requests and tokens as they are now.

        Args:
            of: the requests of this frontend alone; all of them count as `running` then, and nothing but requests
                and tokens is told.
        """
        mine = [one for one in self._open if of is None or one.frontend_id == of]
        busy = sum(one.busy for one in mine)
        running = min(engine.running, busy) if of is None else busy
        load = Load()
        if of is None:
            load.CopyFrom(engine)
            load.frontends = self._frontends()
        load.running, load.waiting = running, busy - running
        load.waiting_tokens = sum(one.left_tokens(self._blocks, self._block_tokens) for one in mine)
        load.context_tokens = sum(one.context_tokens for one in mine)
        return load

    def _frontends(self) -> int:
        since_s = self._clock() - FRONTENDS_S
        serving = {one.frontend_id for one in self._open}
        self._heard_s = {name: at_s for name, at_s in self._heard_s.items() if at_s >= since_s or name in serving}
        return len(self._heard_s)
